"""Experiment: a configuration with objects of the user's, and the names of such objects."""

import hashlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ldit.config.model import SWITCHES
from ldit.config.run import BaseRun, RunConfig
from ldit.errors import ConfigError

_OF_OUR_LOSS = ("objective.min_snr", "objective.direction", "model.mid_layer")
_OF_OUR_NETWORK = ("objective.augment", "objective.dropout", "objective.route", *(f"model.{name}" for name in SWITCHES))
_LONGEST = 80  # characters of a setting in an identity


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A configuration with objects: `ldit.train` takes it, and a user's recipe may return it (`ldit train
    my.py:recipe`).

    The recipe makes the objects at every start, also when a run resumes: checkpoints hold only tensors and the
    configuration. To sample from a run with a network or process of the user's, the experiment is needed again
    (`ldit.load(RUN, experiment=…)`). ConfigError when an object does not fit the kind of run.
    """

    config: BaseRun
    data: Any = None
    """A data set object, used instead of `data.path`: `__len__()`, `names`, `fingerprint()`, `read(index)`; see
    `ldit.data.user_set`."""
    objective: Any = None
    """A process, used instead of `config.process`, such as a subclass of `ldit.diffusion.Flow` with other losses; see
    `ldit.diffusion.process.Process`."""
    network: Callable[[Any], Any] | None = None
    """Builds the network from `config.model`: a torch.nn.Module called as network(x, t, y)."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, BaseRun):
            raise ConfigError(f"Experiment: config must be a run's configuration, got a {type(self.config).__name__}")
        for name in ("objective", "network"):
            if getattr(self, name) is not None and not isinstance(self.config, RunConfig):
                raise ConfigError(f"Experiment: {name} is for runs of diffusion models")
        if not isinstance(self.config, RunConfig):
            return
        # Settings that would have no effect.
        settings = {f"model.{name}": value for name, value in asdict(self.config.model).items()}
        settings |= {f"objective.{name}": value for name, value in asdict(self.config.objective).items()}
        if self.objective is not None:
            _check_off(settings, _OF_OUR_LOSS, "an objective of one's own does not have it")
        if self.network is not None:
            _check_off(settings, _OF_OUR_NETWORK, "a network of one's own does not have it")
            if self.config.parallel.tp > 1:
                raise ConfigError("parallel.tp: a network of one's own is not cut; use parallel.shard")


def _check_off(settings: dict[str, Any], names: Iterable[str], why: str) -> None:
    """ConfigError for the first of these settings that is on."""
    if name := next((name for name in names if settings.get(name)), None):
        raise ConfigError(f"{name}: {why}")


def is_of_package(item: Any) -> bool:
    """Whether a class or function is defined in ldit."""
    return str(item.__module__).split(".")[0] == "ldit"


def name_of(item: Any) -> str:
    """The name of a class or function with its module's; of a callable object or partial that of its class."""
    named = item if hasattr(item, "__qualname__") else type(item)
    module = named.__module__
    if module == "__main__":  # a script that was run, and is imported by `ldit train FILE.py:FUNCTION` another time
        module = Path(getattr(sys.modules[module], "__file__", None) or module).stem
    return f"{module}.{named.__qualname__}"


def identity_of(item: Any) -> str:
    """The name of an object's class, and its settings: the fields of a dataclass that differ from their defaults.

    It is the same in every process, and stays so when the package's classes get further fields.
    """
    settings = [
        f"{one.name}={_shown(getattr(item, one.name))}"
        for one in (fields(item) if is_dataclass(item) else ())
        if one.init and getattr(item, one.name) != one.default
    ]
    return name_of(type(item)) + (f"({', '.join(settings)})" if settings else "")


def _shown(value: Any) -> str:
    """A setting in a few words: functions and objects by name, long values by a hash."""
    if isinstance(value, str | int | float | None | tuple | list | dict):
        text = repr(value)
        return text if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()[:16]
    return name_of(value)
