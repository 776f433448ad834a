"""Files of torch.save that are hostile run no code: S1 of the reliability promises."""

import argparse
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pickles import FORMS, NAMES, Guard, hostile, payloads

from ldit.checkpoint.open import open_source
from ldit.pipeline.load import load_model
from ldit.storage.pickled import load_pickled

Fault = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")


def test_the_payloads_and_the_hook_are_alive(tmp_path: Path, guard: Guard) -> None:
    """Read without restrictions these files do act, and the hook hears it: otherwise silence would prove nothing."""
    path, sentinel = tmp_path / "x.pth", tmp_path / "sentinel"
    acted = 0
    for name in (
        "os.system",
        "builtins.eval",
        "os.mkdir",
        "nested in a dict",
        "dropped from the stack",
        "stack global",
    ):
        hostile(path, payloads(sentinel)[name], "zip")
        with guard as heard:
            torch.load(path, weights_only=False)
        assert sentinel.exists() and heard, name
        sentinel.rmdir() if sentinel.is_dir() else sentinel.unlink()
        acted += 1
    assert acted == 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_run_no_code(
    tmp_path: Path, name: str, form: str, guard: Guard, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor when the environment asks torch to trust every file."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, sentinel = tmp_path / "x.pth", tmp_path / "sentinel"
    hostile(path, payloads(sentinel)[name], form)
    for check in (True, False):
        with guard as heard:
            message = fault(load_pickled, path, check)
        assert not heard and not sentinel.exists()
        assert str(path) in message and len(message) < 1000


@pytest.mark.parametrize("name", ["model_args.pth", "consolidated.00-of-01.pth", "consolidated_ema.00-of-01.pth"])
@pytest.mark.parametrize("form", ["raw", "zip"])
def test_hostile_files_of_the_original_folder(
    make_original: Callable[..., Path], name: str, form: str, guard: Guard, fault: Fault, tmp_path: Path
) -> None:
    folder, sentinel = make_original(), tmp_path / "sentinel"
    hostile(folder / name, payloads(sentinel)["os.system"], form)
    with guard as heard:
        message = fault(lambda: load_model(open_source(folder), ema="ema" in name))
    assert not heard and not sentinel.exists()
    assert str(folder / name) in message


@pytest.mark.parametrize("form", ["raw", "zip"])
def test_hostile_dit_file(tmp_path: Path, form: str, guard: Guard, fault: Fault) -> None:
    path, sentinel = tmp_path / "DiT-XL-2.pt", tmp_path / "sentinel"
    hostile(path, payloads(sentinel)["os.system"], form)
    with guard as heard:
        assert str(path) in fault(open_source, path)
    assert not heard and not sentinel.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch class", "nested in a dict", "in a Namespace"])
def test_a_refusal_names_the_class_and_gives_no_dangerous_advice(tmp_path: Path, name: str, fault: Fault) -> None:
    """torch's own message tells how to load the file all the same, running its code."""
    hostile(tmp_path / "x.pth", payloads(tmp_path / "s")[name], "zip")
    message = fault(load_pickled, tmp_path / "x.pth")
    assert {"os.system": "system", "builtins.eval": "eval", "torch class": "Linear"}.get(name, "system") in message
    assert "weights_only" not in message and "add_safe_globals" not in message


def test_only_namespaces_are_added_to_what_torch_allows(tmp_path: Path) -> None:
    """And the permission ends with the call."""
    content = {"a": argparse.Namespace(x=[1, (2.0, None)], y={"z": argparse.Namespace()}), "o": OrderedDict(b=True)}
    torch.save(content, tmp_path / "x.pth")
    assert load_pickled(tmp_path / "x.pth") == content
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    with pytest.raises(Exception, match="Namespace"):
        torch.load(tmp_path / "x.pth", weights_only=True)


class Stranger(argparse.Namespace):
    """A subclass of the allowed class is another class."""


def test_a_subclass_of_namespace_is_refused(tmp_path: Path, fault: Fault) -> None:
    torch.save(Stranger(x=1), tmp_path / "x.pth")
    assert "Stranger" in fault(load_pickled, tmp_path / "x.pth")


def test_a_tar_archive_is_refused(tmp_path: Path, guard: Guard, fault: Fault) -> None:
    """The oldest format, whose reader once ran code in spite of weights_only."""
    hostile(tmp_path / "pickle", payloads(tmp_path / "sentinel")["os.system"], "raw")
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            archive.add(tmp_path / "pickle", name)
    with guard as heard:
        fault(load_pickled, tmp_path / "x.pth")
    assert set(heard) <= {"os.mkdir", "shutil.rmtree"}, "torch's own empty temporary folder"
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript:UserWarning")
def test_a_torchscript_archive_is_refused(tmp_path: Path, guard: Guard, fault: Fault) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        archive.writestr("x/constants.pkl", b"\x80\x02).")
        archive.writestr("x/code/__torch__.py", "import os")
    with guard as heard:
        fault(load_pickled, tmp_path / "x.pth")
    assert not heard
