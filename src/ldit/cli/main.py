"""The `ldit` command: finds the sub-command, runs it, turns errors into one line and an exit code. No torch."""

import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldit.cli.arguments import parse
from ldit.cli.commands import GROUPS, NAMES, PLANNED, TABLE, Command, rows_of
from ldit.cli.streams import reliable_streams
from ldit.config.requests.fields import nearest
from ldit.errors import LditError


def usage() -> str:
    """Every command with its line, under the heading of its group."""
    blocks = ["usage: ldit COMMAND [--help] [--debug] …\n\ndiffusion transformers: training, sampling, checkpoints"]
    for group in GROUPS:
        rows = [f"  {row.name:<14}{row.line}" for row in TABLE if row.group == group]
        blocks.append("\n".join([group, *rows]))
    blocks.append(f"not built yet: {', '.join(PLANNED)}\n--debug shows the traceback of an error")
    return "\n\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code: 0 done, 2 an error the user can fix, 1 a failed run, 130 / 138 / 143
    stopped by a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    code = guard(lambda: dispatch(arguments[0] if arguments else "", arguments[1:]), debug)
    return leave(code) if argv is None else code


def leave(code: int) -> int:
    """The exit code, for the interpreter to end with. One of several processes ends here, at once: an interpreter that
    ends while threads of a process group live may abort, and a run that succeeded would count as failed."""
    world = sys.modules.get("ldit.parallel.world")
    if world is not None and world.has_met_others:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def dispatch(name: str, arguments: list[str]) -> int:
    """Run the command of this name and return its exit code; LditError for what the user can fix."""
    # What is no command: help, version, completion.
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name == "--version":
        from ldit.version import __version__

        print(__version__)
        return 0
    if name == "--tyro-print-completion":
        return int(_imported("ldit.cli.completion:print_completion")(arguments))
    # Find the command in the table.
    if name in PLANNED:
        raise LditError(f"ldit {name} is not built yet")
    rows = rows_of(name)
    if not rows:
        raise LditError(f"unknown command {name!r}{nearest(name, NAMES)} (commands: {', '.join(NAMES)})")
    if rows[0].name == name:
        return _run(rows[0], arguments)
    # A command with subcommands: the first argument names one. Help without it lists them.
    subcommands = {row.name.removeprefix(f"{name} "): row for row in rows}
    subcommand = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if subcommand is None and len(rows) == 1 and {"-h", "--help"} & set(arguments):
        return _run(rows[0], arguments)
    if subcommand is None and {"-h", "--help"} & set(arguments):
        print(
            "\n".join([f"usage: ldit {name} {'|'.join(subcommands)} …\n", *(f"  {r.name:<14}{r.line}" for r in rows)])
        )
        return 0
    if subcommand not in subcommands:
        got = "" if subcommand is None else f", not {subcommand!r}{nearest(subcommand, subcommands)}"
        raise LditError(f"ldit {name} needs a subcommand: {' or '.join(subcommands)}{got}")
    return _run(subcommands[subcommand], arguments[1:])


def _run(command: Command, arguments: list[str]) -> int:
    """Parse the arguments and call the command's function, which is imported now."""
    if not command.request:
        return int(_imported(command.function)(arguments))
    request = parse(_imported(command.request), arguments, f"ldit {command.name}", command.text or command.line)
    return int(_imported(command.function)(request))


def _imported(place: str) -> Any:
    """The object named "module:name"."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def guard(command: Callable[[], int], debug: bool = False) -> int:
    """Run `command()` with streams that can be relied on; a LditError becomes one line on stderr and its exit code.

    If one of several processes fails, it exits at once. A normal exit would wait for threads, which may wait for other
    processes.
    """
    with reliable_streams():
        try:
            code = _guarded(command, debug)
        except Exception:
            if not _one_of_several():
                raise
            traceback.print_exc()
            code = 1
        finally:
            _drop_unwritable_output()
        if code and _one_of_several():
            sys.stderr.flush()
            os._exit(code)
        return code


def _one_of_several() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _flush() -> None:
    """Flush stdout, if there is one; OSError when the output cannot be written."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_unwritable_output() -> None:
    """Redirect stdout to nothing if it cannot be written; else the interpreter tries again at exit, and reports it."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _guarded(command: Callable[[], int], debug: bool) -> int:
    """Run `command()`; every exception becomes one line and an exit code, or is raised with `debug`."""
    try:
        code = command()
        _flush()
        return code
    except LditError as error:
        if debug:
            raise
        if not error.said_elsewhere:
            print(f"ldit: {' '.join(str(error).split())}", file=sys.stderr)
        return error.code
    except BrokenPipeError:  # the reader of the output closed it, as `head` does
        return 1
    except OSError as error:
        if debug:
            raise
        named = error.filename is not None
        if named and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            from ldit.storage.outputs import disk_error

            path = Path(error.filename)
            print(f"ldit: {disk_error(error, path, path.parent)}", file=sys.stderr)
            return 1
        print(f"ldit: {error.filename}: {error.strerror}" if named else f"ldit: failed: {error}", file=sys.stderr)
        return 2 if named else 1
    except KeyboardInterrupt:
        print("ldit: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(f"ldit: failed: {type(error).__name__}: {' '.join(str(error).split())}{_place(error)}", file=sys.stderr)
        return 1


def _place(error: BaseException) -> str:
    """The line of the user's file that raised an exception, else how to see the traceback."""
    registry = sys.modules.get("ldit.config.recipes.registry")
    return (registry.place_of(error) if registry is not None else "") or " (--debug shows where)"
