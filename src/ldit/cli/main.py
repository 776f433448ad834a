"""The `ldit` command: find the sub-command, run it, turn faults into one line and an exit code. Imports no torch."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from ldit.errors import LditError

COMMANDS = {
    "train": "train a recipe, or go on with a run",
    "sample": "make images from a checkpoint",
    "evaluate": "measure images: FID and its kin, precision, recall",
    "stats": "make a reference of a set of images",
    "encode": "make a latent cache of a set of images",
    "data": "check a folder of images",
    "info": "say what a checkpoint is, without loading it",
    "convert": "write a checkpoint in another layout",
    "ema": "make the average of another width from a run's snapshots",
    "bench": "measure the training step",
    "plot": "draw the curves of runs",
    "launch": "write the batch script of a cluster",
}
PLANNED = ("plan", "demo", "doctor")


def usage() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        "usage: ldit COMMAND [--help] [--debug] …\n\n"
        f"diffusion transformers: training, sampling, checkpoints\n\n{rows}\n\n"
        f"not built yet: {', '.join(PLANNED)}\n--debug shows the traceback of an error"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a fault the user can mend, 1 a failed run, 130 / 138 / 143 stopped by a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    return guard(lambda: _dispatch(arguments[0] if arguments else "", arguments[1:]), debug)


def _dispatch(name: str, arguments: list[str]) -> int:
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name == "--version":
        from ldit.version import __version__

        print(__version__)
        return 0
    if name in PLANNED:
        raise LditError(f"ldit {name} is not built yet")
    if name not in COMMANDS:
        raise LditError(f"unknown command {name!r} (commands: {', '.join(COMMANDS)})")
    code: int = importlib.import_module(f"ldit.cli.{name}").run(arguments)
    return code


def guard(command: Callable[[], int], debug: bool = False) -> int:
    """Run `command()`; a LditError becomes one line on stderr and its exit code.

    A process of several that failed leaves at once: interpreters wait for threads, and those for other processes.
    """
    try:
        code = _guarded(command, debug)
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = 1
    finally:
        _drop_what_cannot_be_said()
    if code and _one_of_several():
        sys.stderr.flush()
        os._exit(code)
    return code


def _one_of_several() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _flush() -> None:
    """OSError where output cannot be said; nobody listens where stdout is closed."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_what_cannot_be_said() -> None:
    """It would be tried again, and complained of, at the interpreter's end."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _guarded(command: Callable[[], int], debug: bool) -> int:
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
    except BrokenPipeError:  # the reader of our output left, as `head` does
        return 1
    except OSError as error:
        if debug:
            raise
        named = error.filename is not None
        print(f"ldit: {error.filename}: {error.strerror}" if named else f"ldit: failed: {error}", file=sys.stderr)
        return 2 if named else 1
    except KeyboardInterrupt:
        print("ldit: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        print(
            f"ldit: failed: {type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)",
            file=sys.stderr,
        )
        return 1
