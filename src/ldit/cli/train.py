"""`ldit train RECIPE --out RUN [--section.key value …]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ldit.cli.arguments import parse
from ldit.config.autoencoder import AutoencoderRun
from ldit.config.classifier import ClassifierRun
from ldit.config.recipes.registry import RECIPES, recipe
from ldit.config.run import RunConfig
from ldit.errors import ConfigError


@dataclass(frozen=True)
class TrainArguments:
    """Flags of `ldit train`."""

    out: Path
    """Directory of the run; the same command again resumes it."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class TrainAutoencoderArguments:
    """Flags of `ldit train` for an autoencoder's recipe."""

    out: Path
    """Directory of the run; the same command again resumes it."""
    config: Annotated[AutoencoderRun, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class TrainClassifierArguments:
    """Flags of `ldit train` for a classifier's recipe."""

    out: Path
    """Directory of the run; the same command again resumes it."""
    config: Annotated[ClassifierRun, tyro.conf.arg(name="")]


def parse_arguments(arguments: list[str]) -> TrainArguments | TrainAutoencoderArguments | TrainClassifierArguments:
    """RECIPE and flags as they stand on the command line; ConfigError when they do not fit. Does nothing else."""
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"ldit train needs a recipe first (recipes: {', '.join(RECIPES)})")
    default = recipe(name or "emoji64-class-xs")
    rest, prog = arguments if name is None else arguments[1:], f"ldit train {name or 'RECIPE'}"
    if isinstance(default, AutoencoderRun):
        autoencoder = TrainAutoencoderArguments(tyro.MISSING, default)
        return parse(TrainAutoencoderArguments, rest, prog, _description(name), autoencoder)
    if isinstance(default, ClassifierRun):
        classifier = TrainClassifierArguments(tyro.MISSING, default)
        return parse(TrainClassifierArguments, rest, prog, _description(name), classifier)
    assert isinstance(default, RunConfig)
    return parse(TrainArguments, rest, prog, _description(name), TrainArguments(tyro.MISSING, default))


def run(arguments: list[str]) -> int:
    parsed = parse_arguments(arguments)
    from ldit.commands.train import run as run_training
    from ldit.log import setup

    setup()
    return run_training(parsed.config, parsed.out)


def _description(name: str | None) -> str:
    if name is not None:
        return f"{RECIPES[name].__doc__} Defaults below are this recipe's."
    rows = "\n".join(f"  {key}: {function.__doc__}" for key, function in RECIPES.items())
    return f"Train a recipe:\n{rows}\nDefaults below are those of emoji64-class-xs."
