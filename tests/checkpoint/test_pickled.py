"""Files of torch.save: hostile ones run no code, damaged ones are found. S1, C6 and C7 of the reliability promises."""

import argparse
import contextlib
import os
import random
import struct
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.checkpoint.pickled import check_archive, load_pickled
from ldit.errors import SourceError
from ldit.flows.pipeline import load_model

Fault = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")

# ---------------------------------------------------------------- the audit hook

# Events by which a pickle could act. "pickle.find_class" is raised by every unpickler but torch's restricted one.
FORBIDDEN = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.putenv",
    "subprocess.Popen",
    "exec",
    "compile",
    "pickle.find_class",
    "socket.connect",
    "ctypes.dlopen",
    "shutil.rmtree",
    "webbrowser.open",
    "builtins.input",
}


class Guard:
    """Hears the interpreter's audit events while armed; hooks cannot be removed, so one serves all tests."""

    def __init__(self) -> None:
        self.armed = False
        self.heard: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        written = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if event in FORBIDDEN or written:
            self.heard.append(event)

    def __enter__(self) -> list[str]:
        self.heard = []
        self.armed = True
        return self.heard

    def __exit__(self, *error: object) -> None:
        self.armed = False


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """Armed after ordinary loads and refusals, so that torch's own imports at the first of them are not heard."""
    path = tmp_path_factory.mktemp("warm") / "warm.pth"
    for zipped in (True, False):
        torch.save({"x": torch.zeros(1), "args": argparse.Namespace()}, path, _use_new_zipfile_serialization=zipped)
        load_pickled(path)
    for form in FORMS:
        hostile(path, b"cno_such_module\nx\n", form)
        with contextlib.suppress(SourceError):
            load_pickled(path)
    return Guard()


# ---------------------------------------------------------------- hostile pickles, by hand


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """GLOBAL module name, MARK arguments TUPLE, REDUCE."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def payloads(sentinel: Path) -> dict[str, bytes]:
    """Name -> body of a pickle that would make `sentinel`, without protocol header and STOP."""
    shell = text(f"touch '{sentinel}'")
    python = text(f"__import__('os').mkdir({str(sentinel)!r})")
    item = b"c__builtin__\nset\n"
    return {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "nt.system": call("nt", "system", shell),
        "builtins.eval": call("builtins", "eval", python),
        "builtins.exec": call("builtins", "exec", python),
        "__builtin__.eval": call("__builtin__", "eval", python),
        "subprocess": call("subprocess", "Popen", b"(" + text("touch") + text(str(sentinel)) + b"l"),
        "os.mkdir": call("os", "mkdir", text(str(sentinel))),
        "import by getattr": call("builtins", "getattr", call("builtins", "__import__", text("os")), text("mkdir"))
        + b"("
        + text(str(sentinel))
        + b"tR",
        "nested in a dict": b"}" + text("model") + call("os", "system", shell) + b"s",
        "as an argument of an allowed class": call("collections", "OrderedDict", call("os", "system", shell)),
        "in a Namespace": b"cargparse\nNamespace\n)\x81}" + text("model") + call("os", "system", shell) + b"sb",
        "as a Namespace's dict": b"cargparse\nNamespace\n)\x81("
        + text("__class__")
        + call("os", "system", shell)
        + b"db",
        "dropped from the stack": call("os", "system", shell) + b"0}",
        "old instance opcode": b"(" + shell + b"ios\nsystem\n",
        "object opcode": b"(cos\nsystem\n" + shell + b"o",
        "inst of a Namespace's neighbour": call("argparse", "FileType", text("w")) + b"(" + text(str(sentinel)) + b"tR",
        "torch.load": call("torch.serialization", "load", text(str(sentinel))),
        "torch.hub": call("torch.hub", "load", text(str(sentinel)), text("x")),
        "torch class": call("torch.nn.modules.linear", "Linear", b"K\x04", b"K\x04"),
        "torch.storage loader": call("torch.storage", "_load_from_bytes", b"C\x01N"),
        "numpy": call("numpy", "fromfile", text(str(sentinel))),
        "allowed class's method": b"cargparse\nNamespace.__init__\n)R",
        "attribute through a dotted name": call("torch._utils", "os.system", shell),
        "stack global": text("os") + text("system") + b"\x93(" + shell + b"tR",
        "extension registry": b"\x82\x01" + item,
        "persistent id": text("x") + b"Q",
    }


NAMES = list(payloads(Path("x")))
FORMS = ["raw", "raw with protocol", "raw of protocol 4", "zip"]


def hostile(path: Path, body: bytes, form: str) -> None:
    """A pickle as it is, or as data.pkl of an archive laid out as torch writes it."""
    head = {"raw": b"", "raw with protocol": b"\x80\x02", "raw of protocol 4": b"\x80\x04", "zip": b"\x80\x02"}[form]
    content = head + body + b"."
    if form != "zip":
        path.write_bytes(content)
        return
    torch.save({"x": torch.zeros(2)}, path)
    repack(path, lambda name, data: content if name.endswith("/data.pkl") else data)


def repack(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))


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


# ---------------------------------------------------------------- memory


def peak_of(path: Path) -> int:
    tracemalloc.start()
    try:
        with contextlib.suppress(SourceError):
            load_pickled(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["raw with protocol", "zip"])
def test_a_small_pickle_cannot_ask_for_much_memory(tmp_path: Path, form: str, guard: Guard) -> None:
    """bytearray(n) is on torch's own list of allowed calls."""
    hostile(tmp_path / "x.pth", call("builtins", "bytearray", b"J" + struct.pack("<i", 64 << 20)), form)
    assert peak_of(tmp_path / "x.pth") < 4 << 20


@pytest.mark.parametrize("name", ["DATA.PKL", "Data.pkl"])
def test_the_pickle_is_found_under_any_case(tmp_path: Path, name: str, guard: Guard) -> None:
    """torch looks records up without regard to case."""
    path = tmp_path / "x.pth"
    hostile(path, call("builtins", "bytearray", b"J" + struct.pack("<i", 64 << 20)), "zip")
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in records.items():
            archive.writestr(record.replace("data.pkl", name), data)
    assert peak_of(path) < 4 << 20


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_records_of_one_name_are_no_way_around_the_check(tmp_path: Path, order: tuple[int, int]) -> None:
    """Readers of archives differ in which of the two they take."""
    path = tmp_path / "x.pth"
    bomb = b"\x80\x02" + call("builtins", "bytearray", b"J" + struct.pack("<i", 64 << 20)) + b"."
    pickles = (bomb, b"\x80\x02}.")
    torch.save({"x": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        rest = {i.filename: archive.read(i) for i in archive.infolist() if not i.filename.endswith("data.pkl")}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for which in order:
            archive.writestr("x/data.pkl", pickles[which])
        for name, data in rest.items():
            archive.writestr(name, data)
    assert peak_of(path) < 4 << 20


@pytest.mark.parametrize(
    "body",
    [
        call("torch", "FloatTensor", b"J\x00\x00\x01\x00", b"J\x00\x00\x01\x00"),
        call("torch", "Tensor", b"J\x00\x00\x01\x00", b"J\x00\x00\x01\x00"),
        call("torch.storage", "UntypedStorage", b"J\x00\x00\x00\x40"),
    ],
    ids=["FloatTensor", "Tensor", "UntypedStorage"],
)
def test_constructors_of_unfilled_tensors_are_refused(tmp_path: Path, body: bytes, fault: Fault) -> None:
    """A few bytes that would take 1 to 16 GiB of address space, and whose content would be whatever was there."""
    hostile(tmp_path / "x.pth", body, "zip")
    fault(load_pickled, tmp_path / "x.pth")


def test_a_compressed_record_is_not_inflated_into_memory(tmp_path: Path, guard: Guard, fault: Fault) -> None:
    """torch stores its records as they are; a compressed one is a bomb."""
    path = tmp_path / "x.pth"
    hostile(path, b"N0" * (16 << 20) + b"N", "zip")
    repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert peak_of(path) < 8 << 20


def test_compressed_tensors_are_refused(tmp_path: Path, fault: Fault) -> None:
    """Mapping them would take compressed bytes for numbers."""
    torch.save({"x": torch.zeros(1000)}, tmp_path / "x.pth")
    repack(tmp_path / "x.pth", lambda name, data: data, zipfile.ZIP_DEFLATED)
    for check in (True, False):
        fault(load_pickled, tmp_path / "x.pth", check)


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    """In memory they lie as far apart as in the file; writing to them does not reach it."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(4 << 20), "b": torch.ones(3)}, path)
    assert peak_of(path) < 12 << 20  # the pieces of the checksum
    state = load_pickled(path)
    assert (
        state["b"].data_ptr() - state["a"].data_ptr()
        == record_span(path, "data/1").start - record_span(path, "data/0").start
    )
    state["a"].zero_()
    assert load_pickled(path)["a"].sum() == 4 << 20


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path, fault: Fault) -> None:
    torch.save({"x": torch.arange(8.0)}, tmp_path / "x.pth")

    def widen(name: str, data: bytes) -> bytes:
        return data.replace(b"K\x08\x85", b"M\xff\xff\x85") if name.endswith("data.pkl") else data

    before = (tmp_path / "x.pth").read_bytes()
    repack(tmp_path / "x.pth", widen)
    assert (tmp_path / "x.pth").read_bytes() != before
    fault(load_pickled, tmp_path / "x.pth")


# ---------------------------------------------------------------- damage


@pytest.fixture
def good() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(16, 16, generator=generator),
        "b": torch.randn(5, generator=generator),
        "args": argparse.Namespace(model="DiT_Llama_3B_patch2", qk_norm=True),
    }


def equal(one: Any, other: Any) -> bool:
    if not isinstance(one, dict) or one.keys() != other.keys():
        return False
    return all(
        isinstance(one[k], Tensor) and one[k].dtype == v.dtype and one[k].shape == v.shape and torch.equal(one[k], v)
        if isinstance(v, Tensor)
        else one[k] == v
        for k, v in other.items()
    )


def refusal(path: Path) -> str | None:
    """The SourceError's message, or None; any other exception passes through."""
    try:
        load_pickled(path)
    except SourceError as error:
        return str(error)
    return None


def record_span(path: Path, ending: str) -> range:
    """The bytes of a record's content."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(ending))
    data = path.read_bytes()
    names = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
    start = info.header_offset + 30 + sum(names)
    return range(start, start + info.file_size)


def test_what_is_saved_comes_back(tmp_path: Path, good: dict[str, Any]) -> None:
    torch.save(good, tmp_path / "x.pth")
    assert equal(load_pickled(tmp_path / "x.pth"), good)
    check_archive(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
def test_truncated(tmp_path: Path, good: dict[str, Any], share: float, fault: Fault) -> None:
    path = tmp_path / "x.pth"
    torch.save(good, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    for check in (True, False):
        assert str(path) in fault(load_pickled, path, check)


@pytest.mark.parametrize("cut", [1, 2, 22, 100])
def test_the_last_bytes_missing(tmp_path: Path, good: dict[str, Any], cut: int, fault: Fault) -> None:
    path = tmp_path / "x.pth"
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert str(path) in fault(load_pickled, path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"PK\x05\x06" + b"\0" * 18, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_not_a_torch_file(tmp_path: Path, content: bytes, fault: Fault) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert str(tmp_path / "x.pth") in fault(load_pickled, tmp_path / "x.pth")


def test_missing_and_folder(tmp_path: Path, fault: Fault) -> None:
    assert fault(load_pickled, tmp_path / "x.pth") == f"{tmp_path / 'x.pth'} is missing"
    fault(load_pickled, tmp_path)


@pytest.mark.parametrize("ending", ["data.pkl", "data/0", "data/1", "byteorder", "version"])
def test_a_flipped_bit_in_a_record_is_always_found(
    tmp_path: Path, good: dict[str, Any], ending: str, flip: Callable[[Path, int], None], fault: Fault
) -> None:
    path = tmp_path / "x.pth"
    torch.save(good, path)
    span = record_span(path, ending)
    rng = random.Random(ending)
    for bit in {rng.randrange(8 * span.start, 8 * span.stop) for _ in range(12)} | {8 * span.start, 8 * span.stop - 1}:
        flip(path, bit)
        message = fault(load_pickled, path)
        assert str(path) in message and ending in message
        flip(path, bit)
    assert equal(load_pickled(path), good)


@pytest.mark.parametrize("part", ["headers", "directory", "anywhere"])
def test_a_flipped_bit_anywhere_is_found_or_harmless(
    tmp_path: Path, good: dict[str, Any], part: str, flip: Callable[[Path, int], None]
) -> None:
    """A SourceError, or the flip hit what nobody reads and the content is equal; no other exception, ever."""
    path = tmp_path / "x.pth"
    torch.save(good, path)
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        headers = [i.header_offset + n for i in archive.infolist() for n in range(30 + len(i.filename))]
    places = {"headers": headers, "directory": range(directory, size), "anywhere": range(size)}[part]
    rng = random.Random(part)
    found = 0
    for _ in range(80):
        bit = 8 * rng.choice(places) + rng.randrange(8)
        flip(path, bit)
        message = refusal(path)
        if message is None:
            assert equal(load_pickled(path), good), f"bit {bit}"
        else:
            assert str(path) in message and len(message.splitlines()) == 1
            found += 1
        with contextlib.suppress(SourceError):
            load_pickled(path, check=False)
        flip(path, bit)
    assert found >= 20


def test_damaged_weights_of_a_folder_are_found_before_use(
    make_original: Callable[..., Path], flip: Callable[[Path, int], None], fault: Fault
) -> None:
    folder = make_original()
    for name in ("consolidated_ema.00-of-01.pth", "consolidated.00-of-01.pth"):
        path = folder / name
        bit = 8 * record_span(path, "data/3").start + 5
        flip(path, bit)
        assert str(path) in fault(lambda name=name: load_model(open_source(folder), ema="ema" in name))
        assert str(path) in fault(lambda: open_source(folder).verify())
        flip(path, bit)
    open_source(folder).verify()


def test_opening_spares_reading_the_weights(
    make_original: Callable[..., Path], flip: Callable[[Path, int], None]
) -> None:
    """The spec and shapes of a damaged file are still told; only its content is not given."""
    folder = make_original()
    flip(folder / "consolidated.00-of-01.pth", 8 * record_span(folder / "consolidated.00-of-01.pth", "data/3").start)
    source = open_source(folder)
    assert source.shapes(ema=False)["x_embedder.weight"] == ((64, 16), "fp32")


@pytest.mark.parametrize("body", [b"cos\nsystem\n.", b"cbuiltins\nbytearray\n."])
def test_numbers_of_the_old_format_are_not_taken_for_a_pickle(tmp_path: Path, body: bytes) -> None:
    """99 numbers: their count begins with the byte of the instruction GLOBAL, and raw numbers follow it."""
    numbers = torch.tensor(list(body.ljust(99, b".")), dtype=torch.uint8)
    assert len(numbers) == ord("c")
    torch.save({"x": numbers}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_pickled(tmp_path / "x.pth")["x"], numbers)


def test_old_format_flips_raise_nothing_else(tmp_path: Path, flip: Callable[[Path, int], None]) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(16)}, path, _use_new_zipfile_serialization=False)
    rng = random.Random(0)
    for _ in range(100):
        bit = rng.randrange(8 * os.path.getsize(path))
        flip(path, bit)
        message = refusal(path)
        assert message is None or len(message.splitlines()) == 1
        flip(path, bit)
