"""What the original's flags need to know: whether a run directory fits them, and the width of text features."""

import re
from pathlib import Path

from ldit.checkpoint.run import committed_steps
from ldit.codecs.text import feature_width, text_folder
from ldit.errors import ConfigError
from ldit.storage.names import CHECKPOINTS

_ORIGINAL_STEP = re.compile(r"\d{7,}")  # of the original; ours are step-00000100


def check_start(out: Path, auto_resume: bool, resume: Path | None) -> None:
    """ConfigError when training into `out` would not start where the flags say.

    A run always resumes from its latest step: `resume` must be that step, and without `resume` and `auto_resume` there
    must be no step. A directory with steps of the original is refused: their optimiser state cannot be read, and the
    original would resume from them rather than start a new run.
    """
    steps = committed_steps(out)
    if resume is not None:
        _check_named(out, resume, steps)
    elif steps and not auto_resume:
        raise ConfigError(
            f"--no_auto_resume: {out} already holds step {steps[0][0]}; choose another --results_dir or resume it"
        )
    elif not steps and (old := _newest_original(out)) is not None:
        raise ConfigError(
            f"--results_dir: {out} holds checkpoints of the original, whose optimiser state cannot be read; "
            f"choose another one and start with --init_from {old}"
        )


def _check_named(out: Path, resume: Path, steps: list[tuple[int, Path]]) -> None:
    if not resume.is_dir():
        raise ConfigError(f"--resume: there is no folder {resume}")
    number = next((step for step, folder in steps if folder.resolve() == resume.resolve()), None)
    if number is None:
        raise ConfigError(
            f"--resume: {resume} is not a committed step of {out / CHECKPOINTS}; "
            f"to start another run with its weights use --init_from {resume}"
        )
    if number != steps[0][0]:
        raise ConfigError(
            f"--resume: {out} holds the newer step {steps[0][0]}; remove the steps after {number}, "
            f"or start another run with --init_from {resume}"
        )


def _newest_original(out: Path) -> Path | None:
    folder = out / CHECKPOINTS
    names = [path for path in folder.iterdir() if _ORIGINAL_STEP.fullmatch(path.name)] if folder.is_dir() else []
    return max((path for path in names if any(path.glob("consolidated*.pth"))), key=lambda p: int(p.name), default=None)


def text_width(encoder: str) -> int:
    """Width of the features of a text encoder; CodecError when there is none of this name."""
    return feature_width(text_folder(encoder))
