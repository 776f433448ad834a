"""`ldit --tyro-print-completion bash|zsh|tcsh|fish`: a script for shell completion, written by tyro."""

import contextlib
import importlib
import io
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from ldit.cli.arguments import for_tyro
from ldit.cli.commands import NAMES, rows_of
from ldit.config.recipes.registry import RECIPES, recipe
from ldit.config.requests.launch import SlurmRequest

FLAG = "--tyro-print-completion"


def print_completion(shell: list[str]) -> int:
    """Print the script for `shell`: ["bash"], ["zsh"], ["tcsh"] or ["fish"]."""
    # One class that has all commands as choices: tyro writes the script for it.
    commands = [(name, _command(name)) for name in NAMES]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            tyro.cli(_choice(commands), prog="ldit", args=[FLAG, *shell], config=(tyro.conf.OmitSubcommandPrefixes,))
    except SystemExit as stop:
        if stop.code:
            raise
    # A flag's text may have several lines, and the script would offer each line as a word.
    for line in printed.getvalue().splitlines():
        # In fish's quoting the backslash of a newline is doubled.
        print(line.replace("\\\\n", " ").replace("\\n", " ") if line.startswith("COMPLETION_SPEC") else line)
    return 0


def _command(name: str) -> Any:
    """The class from which tyro reads the flags of a command; one with subcommands or recipes has a choice of them."""
    rows = rows_of(name)
    if name == "train":
        return _with_choice(name, [(one, _recipe(one)) for one in RECIPES])
    if rows[0].name != name:
        return _with_choice(name, [(row.name.removeprefix(f"{name} "), _request(row.request)) for row in rows])
    return _request(rows[0].request)


def _request(place: str) -> Any:
    """The class of a row's request. Only `ldit launch slurm`, which has two sets of flags, has none in the table."""
    if not place:
        return for_tyro(SlurmRequest)
    module, _, kind = place.partition(":")
    return for_tyro(getattr(importlib.import_module(module), kind))


def _recipe(name: str) -> Any:
    config = recipe(name)
    kind: Any = type(config)
    hint: Any = Annotated[kind, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    return make_dataclass("recipe", [("out", Path), ("config", hint, config)], frozen=True)


def _with_choice(name: str, kinds: list[tuple[str, Any]]) -> Any:
    if len(kinds) == 1:  # with a single choice tyro would omit the subcommand
        kinds = [*kinds, ("--help", None)]
    return make_dataclass(name, [("subcommand", _choice(kinds))])


def _choice(kinds: list[tuple[str, Any]]) -> Any:
    return Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds)]  # noqa: UP007 (at run time)
