"""Hostile pickles written by hand, and an audit hook that hears what they do."""

import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def record_span(path: Path, ending: str) -> range:
    """The bytes of a record's content."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(ending))
    data = path.read_bytes()
    names = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
    start = info.header_offset + 30 + sum(names)
    return range(start, start + info.file_size)
