"""Experiment: a configuration, with objects of the user's in place of some that it describes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldit.config.run import BaseRun, RunConfig
from ldit.errors import ConfigError


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
        if self.network is not None and self.config.parallel.tp > 1:
            raise ConfigError("parallel.tp: a network of one's own is not cut; use parallel.shard")
