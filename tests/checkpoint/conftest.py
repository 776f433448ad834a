"""Tiny models as files, and the tools that damage them."""

import argparse
import codecs
import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pickles
import pytest
import steps
import torch
from models import SIZES, TABLE, Tiny, weights_of

from ldit.checkpoint.export import write_export
from ldit.checkpoint.run import retire
from ldit.checkpoint.save import write_step
from ldit.config.model import ClassModelConfig
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, DDPMConfig, ModelSpec
from ldit.errors import SourceError
from ldit.storage.atomic import committed
from ldit.storage.names import OPTIMIZER
from ldit.storage.pickled import load_pickled


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Named without the test's parameters, which messages are searched for, and removed: models add up."""
    path = tmp_path_factory.mktemp("at")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    config = ClassModelConfig(**SIZES, input_size=8, num_classes=10)
    names = tuple(f"class {i}" for i in range(10))
    spec = ModelSpec(config, DDPMConfig(), AutoencoderConfig(), ClassConditionerConfig(names))
    return Tiny(spec, weights_of(config, 1), weights_of(config, 2))


@pytest.fixture
def make_export(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A folder in our layout, with a manifest unless told not to write one."""

    def make(name: str = "export", ema: bool = True, with_manifest: bool = True) -> Path:
        folder = tmp_path / name
        with committed(folder) as temporary:
            write_export(temporary, tiny.spec, tiny.raw.items(), tiny.ema.items() if ema else None)
        if not with_manifest:
            (folder / "manifest.json").unlink()
        return folder

    return make


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def save(tiny: Tiny, run: Path) -> Callable[..., Path]:
    """Commit a step whose label table tells the step, and whose optimiser state is one tensor."""

    def commit(step: int, keep: int = 0, keep_every: int = 0) -> Path:
        table = {TABLE: torch.full((11, 64), float(step))}
        tensors = {
            "model": {**tiny.raw, **table},
            "ema": {**tiny.ema, **table},
            OPTIMIZER: {"exp_avg.x": torch.full((3,), float(step))},
        }
        folder = write_step(run, step, tiny.spec, steps.sets_of(tensors), {"step": step}, steps.ALONE)
        retire(run, keep, keep_every)
        return folder

    return commit


@pytest.fixture
def make_original(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """A folder in the original's layout written by hand; sizes stand in the Namespace, as no registered one is tiny."""

    def make(
        raw: dict[Any, Any] | None = None,
        ema: dict[Any, Any] | None = None,
        name: str = "original",
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        arguments = {"model": "DiT_Llama", **SIZES, "image_size": 64, "num_classes": 10, "vae": "ema", **changes}
        torch.save(argparse.Namespace(**arguments), folder / "model_args.pth")
        torch.save(tiny.raw if raw is None else raw, folder / "consolidated.00-of-01.pth")
        torch.save(tiny.ema if ema is None else ema, folder / "consolidated_ema.00-of-01.pth")
        return folder

    return make


@pytest.fixture(scope="session")
def fault() -> Callable[..., str]:
    """Call, expect a SourceError of one line without terminal controls, return its message."""

    def check(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        with pytest.raises(SourceError) as caught:
            call(*arguments, **options)
        message = str(caught.value)
        assert len(message.splitlines()) == 1 and message.isprintable(), repr(message)
        return message

    return check


@pytest.fixture(scope="session")
def flip() -> Callable[[Path, int], None]:
    """Flip one bit of a file."""

    def apply(path: Path, bit: int) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    return apply


@pytest.fixture(scope="session")
def same() -> Callable[..., bool]:
    """Whether two tables hold the same names with the same bits."""

    def equal(one: Any, other: Any) -> bool:
        one, other = dict(one), dict(other)
        return one.keys() == other.keys() and all(
            a.dtype == other[k].dtype and a.shape == other[k].shape and torch.equal(a, other[k]) for k, a in one.items()
        )

    return equal


@pytest.fixture
def warnings_said() -> Iterator[list[str]]:
    """What the package's logger warns of, whether or not it propagates."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ldit")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> pickles.Guard:
    """Armed after ordinary loads and refusals, so that torch's own imports at the first of them are not heard."""
    path = tmp_path_factory.mktemp("warm") / "warm.pth"
    for zipped in (True, False):
        torch.save({"x": torch.zeros(1), "args": argparse.Namespace()}, path, _use_new_zipfile_serialization=zipped)
        load_pickled(path)
    for form in pickles.FORMS:
        pickles.hostile(path, b"cno_such_module\nx\n", form)
        with contextlib.suppress(SourceError):
            load_pickled(path)
    for name in ("raw_unicode_escape", "unicode_escape", "latin-1", "ascii", "utf-8"):
        codecs.lookup(name)  # pickletools imports them when it first meets a string of their kind
    return pickles.Guard()
