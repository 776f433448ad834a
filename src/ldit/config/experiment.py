"""Experiment: a configuration with objects of one's own in the place of those that it describes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldit.config.run import BaseRun, RunConfig
from ldit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What `ldit.train` takes, and what a recipe in a file of one's own may return: `ldit train my.py:recipe`.

    The recipe makes the objects anew at every start, also at a resume; checkpoints hold numbers and the configuration
    alone. Whoever samples a run with a network or a process of its own needs the experiment again
    (`ldit.load(RUN, experiment=…)`). ConfigError where an object does not go with the kind of run.
    """

    config: BaseRun
    data: Any = None
    """A data set object in the place of `data.path`: `__len__()`, `names`, `fingerprint()`, `read(index)`; see
    `ldit.data.user_set`."""
    objective: Any = None
    """A process in the place of `config.process`, such as a subclass of `ldit.diffusion.Flow` with other losses; see
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
