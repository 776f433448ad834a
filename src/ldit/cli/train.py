"""`ldit train RECIPE --out RUN [--section.key value …]`.

RECIPE may also be FILE.py:FUNCTION, a run directory, or a model to fine-tune.
"""

from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ldit.cli.arguments import mistakes_once, parse
from ldit.commands.finetune import experiment_of
from ldit.config.experiment import Experiment
from ldit.config.paths import expanded
from ldit.config.recipes.registry import RECIPES, is_run_directory, recipe_function
from ldit.config.run import BaseRun
from ldit.errors import ConfigError

SHOWN = "emoji64-class-xs"  # the recipe whose defaults `ldit train --help` shows


@dataclass(frozen=True)
class TrainRequest:
    """A parsed command line of `ldit train`."""

    out: Path
    experiment: Experiment
    verbose: bool = False

    @property
    def config(self) -> BaseRun:
        return self.experiment.config


@dataclass(kw_only=True)
class _Out:
    """Flags in addition to those of the configuration."""

    out: Path
    """Run directory; rerun the same command to resume it."""
    verbose: bool = False
    """Print the whole configuration, which is also in RUN/config.json."""


def parse_arguments(arguments: list[str]) -> TrainRequest:
    """Parse RECIPE and flags; ConfigError when they do not fit. A user's FILE.py is executed for its recipe."""
    # The recipe's values are the defaults of the flags.
    name = expanded(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"ldit train needs a recipe first (recipes: {', '.join(RECIPES)})")
    experiment = experiment_of(name or SHOWN)
    # A class whose fields are --out and the sections of this kind of run.
    flags, prog = arguments if name is None else arguments[1:], f"ldit train {name or 'RECIPE'}"
    kind = type(experiment.config)
    form = make_dataclass(
        "TrainFlags", [("config", Annotated[kind, tyro.conf.arg(name="")])], bases=(_Out,), kw_only=True
    )
    # A run directory is its own --out.
    out: Any = Path(name) if name is not None and is_run_directory(name) else tyro.MISSING
    parsed: Any = parse(form, flags, prog, _description(name), form(out=out, config=experiment.config))
    return TrainRequest(parsed.out, replace(experiment, config=parsed.config), parsed.verbose)


def run(arguments: list[str]) -> int:
    with mistakes_once():
        request = parse_arguments(arguments)
    from ldit.commands.train import run as run_training
    from ldit.log import logger, setup

    setup(verbose=request.verbose)
    if arguments and is_run_directory(name := expanded(arguments[0])) and Path(name).resolve() != request.out.resolve():
        logger.warning(
            "%s is a new run with the configuration of %s, not its weights; a step of it, %s/checkpoints/step-…, is a "
            "model to fine-tune",
            request.out, name, name,
        )  # fmt: skip
    return run_training(request.experiment, request.out)


def _description(name: str | None) -> str:
    """The text at the top of help; without a recipe it lists all of them."""
    if name is None:
        rows = "\n".join(f"  {key}: {recipe_function(key).__doc__}" for key in RECIPES)
        return (
            "Train RECIPE: a name of this list, FILE.py:FUNCTION for a recipe of your own, a run directory to resume, "
            f"or a model to fine-tune on --data.path.\n{rows}\nThe defaults below are those of {SHOWN}."
        )
    if name in RECIPES:
        return f"{recipe_function(name).__doc__} The defaults below are this recipe's."
    return f"The defaults below are those of {name}."
