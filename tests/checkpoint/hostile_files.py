"""Checkpoints made to harm their reader: case i is made from seed i, and is the same on every machine."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pickles
from damage import sign

from ldit.storage import manifest

HUGE = [2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    "",
    "x",
    "\ud800",
    "../../x",
    [],
    {},
    [[]],
    {"": {}},
    "1",
    *HUGE,
]
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E5M2", "F4", "C64", "F99", "", "f32"]


def random_json(rng: random.Random, depth: int = 3) -> Any:
    """A value of any type, sometimes nested."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 5:
        return rng.choice(ODD)
    if kind < 7:
        return {rng.choice(["a", "format", "files", "weight_map", "size"]): random_json(rng, depth - 1)}
    return [random_json(rng, depth - 1) for _ in range(rng.randrange(3))]


def other_somewhere(rng: random.Random, data: Any) -> Any:
    """The document with one value, key or entry at a random place replaced."""
    if not isinstance(data, (dict, list)) or not data or rng.random() < 0.1:
        return random_json(rng)
    keys: Any = list(data) if isinstance(data, dict) else range(len(data))
    key = rng.choice(keys)
    changed: Any = dict(data) if isinstance(data, dict) else list(data)
    if rng.random() < 0.25:
        value = changed.pop(key)
        if isinstance(changed, dict) and rng.random() < 0.5:
            changed[rng.choice(["../x", "x\0", "/etc/passwd", "\ud800", "x" * 300, key + " "])] = value
        return changed
    changed[key] = other_somewhere(rng, data[key])
    return changed


# ---------------------------------------------------------------- weight files


def header(text: bytes, data: bytes = b"", said: int | None = None) -> bytes:
    """A safetensors file of this header; `said` is the length it claims."""
    return struct.pack("<Q", (len(text) if said is None else said) % 2**64) + text + data


def false_length(rng: random.Random, good: bytes) -> bytes:
    said = rng.choice([*HUGE, len(good), len(good) - 8, len(good) - 7, 0, 1, 100_000_000, 100_000_001])
    return struct.pack("<Q", said % 2**64) + good[8:]


def false_entry(rng: random.Random, good: bytes) -> bytes:
    """Offsets that overlap, run backwards or past the end; shapes that overflow; types that are none."""
    size = struct.unpack("<Q", good[:8])[0]
    table = json.loads(good[8 : 8 + size])
    for entry in rng.sample(list(table.values()), rng.randint(1, 3)):
        start, end = entry["data_offsets"]
        number = rng.choice([-1, 0, 1, start + 4, end - 4, *HUGE, -(2**63)])
        field = rng.randrange(5)
        if field == 0:
            entry["data_offsets"] = [number, end] if rng.random() < 0.5 else [start, number]
        elif field == 1:
            entry["data_offsets"] = rng.choice(
                [[end, start], [start], [], [start, end, end], "x", None, [0, end - start]]
            )
        elif field == 2:
            entry["shape"] = rng.choice([[number], [number, number], [*entry["shape"], 0], [], [1] * 100, "x", None])
        elif field == 3:
            entry["dtype"] = rng.choice(DTYPES)
        else:
            entry[rng.choice(["extra", "shape", "dtype"])] = random_json(rng)
    return header(json.dumps(table).encode(), good[8 + size :])


def same_keys(rng: random.Random, good: bytes) -> bytes:
    """One name twice, with different data, shapes or types."""
    size = struct.unpack("<Q", good[:8])[0]
    table = json.loads(good[8 : 8 + size])
    name = rng.choice(list(table))
    twice = dict(table[name], **rng.choice([{}, {"shape": [1]}, {"dtype": "F16"}, {"data_offsets": [0, 4]}]))
    text = json.dumps(table)[:-1] + f", {json.dumps(name)}: {json.dumps(twice)}}}"
    return header(text.encode(), good[8 + size :])


def deep(rng: random.Random, good: bytes) -> bytes:
    depth = rng.choice([100, 127, 128, 1000, 100_000])
    opened, closed = rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"__metadata__":', b"}")])
    text = opened * depth + rng.choice([b"", b"1" + closed * depth])
    return header(text) if rng.random() < 0.7 else header(b'{"x":' + text + b"}")


def noise(rng: random.Random, good: bytes) -> bytes:
    data = rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 5000]))
    return header(data) if rng.random() < 0.5 else data


def spliced(rng: random.Random, good: bytes) -> bytes:
    """Pieces of a good file changed, cut out or doubled, mostly in its first kilobytes."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(data), rng.choice([16, 3000, len(data)])))
        length = rng.randrange(1, 20)
        data[at : at + length] = rng.choice(
            [rng.randbytes(length), b"", bytes(data[at : at + length]) * 2, b"\xff" * 8]
        )
    return bytes(data)


WEIGHTS = [false_length, false_entry, false_entry, same_keys, deep, noise, spliced, spliced]


# ---------------------------------------------------------------- pickles


def with_code(rng: random.Random, good: bytes, path: Path, sentinel: Path) -> None:
    pickles.hostile(path, pickles.payloads(sentinel)[rng.choice(pickles.NAMES)], rng.choice(pickles.FORMS))


def opcodes(rng: random.Random, good: bytes, path: Path, sentinel: Path) -> None:
    """Instructions in any order, with the names of calls that act among them."""
    words = [
        b"(",
        b")",
        b"}",
        b"]",
        b"l",
        b"d",
        b"t",
        b"0",
        b"2",
        b"R",
        b"b",
        b"s",
        b"u",
        b"e",
        b"a",
        b"o",
        b"\x81",
        b"\x93",
    ]
    words += [b"N", b"K\x05", b"J\xff\xff\xff\x7f", b"q\x01", b"h\x01", b"Q"]
    words += [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n"]
    words += [b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"cbuiltins\nbytearray\n"]
    words += [pickles.text(f"touch '{sentinel}'"), pickles.text("storage"), b"\x8e" + struct.pack("<Q", 2**40)]
    pickles.hostile(path, b"".join(rng.choices(words, k=rng.randint(1, 40))), rng.choice(pickles.FORMS))


def spliced_archive(rng: random.Random, good: bytes, path: Path, sentinel: Path) -> None:
    path.write_bytes(spliced(rng, good))


def noisy_archive(rng: random.Random, good: bytes, path: Path, sentinel: Path) -> None:
    path.write_bytes(rng.choice([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"]) + noise(rng, good))


def bomb(rng: random.Random, good: bytes, path: Path, sentinel: Path) -> None:
    """A few bytes that ask for a few hundred megabytes, by calls that torch's own list allows."""
    number = b"J" + struct.pack("<i", rng.randrange(200 << 20, 300 << 20))
    body = rng.choice([pickles.call("builtins", "bytearray", number), pickles.call("torch", "ByteTensor", number)])
    pickles.hostile(path, body, rng.choice(pickles.FORMS))


PICKLES = [bomb, with_code, with_code, opcodes, spliced_archive, noisy_archive]


# ---------------------------------------------------------------- folders


def a_weight_file(rng: random.Random, folder: Path) -> Path:
    """One weight file of a folder in our layout is replaced; a manifest would tell, so there is none, or a true one."""
    path = rng.choice(sorted(folder.rglob("*.safetensors")))
    path.write_bytes(rng.choice(WEIGHTS)(rng, path.read_bytes()))
    return path


def a_document(rng: random.Random, folder: Path) -> Path:
    """config.json or an index with odd values, keys and entries."""
    path = rng.choice([p for p in sorted(folder.glob("*.json")) if p.name != manifest.NAME])
    if rng.random() < 0.15:
        path.write_bytes(deep(rng, b"")[8:] if rng.random() < 0.5 else noise(rng, b""))
        return path
    data = json.loads(path.read_text())
    for _ in range(rng.randint(1, 3)):
        data = other_somewhere(rng, data)
    path.write_text(json.dumps(data))
    return path


def a_manifest(rng: random.Random, folder: Path) -> Path:
    """A manifest with odd types, names and numbers whose own checksum is true."""
    path = folder / manifest.NAME
    data = manifest.build(folder)
    body = other_somewhere(rng, {key: data[key] for key in ("format", "files")})
    path.write_text(json.dumps(sign(body) if isinstance(body, dict) else body))
    return path


def make(case: int, good: dict[str, Path], parent: Path, sentinel: Path) -> Path:
    """A hostile checkpoint in the empty folder `parent`."""
    rng = random.Random(case)
    kind = ("weights", "document", "manifest", "pt", "original")[case % 5]
    if kind == "pt":
        path = parent / "model.pt"
        rng.choice(PICKLES)(rng, good["pt"].read_bytes(), path, sentinel)
        return path
    if kind == "original":
        folder = Path(shutil.copytree(good["original"], parent / "original"))
        path = rng.choice(sorted(folder.glob("*.pth")))
        rng.choice(PICKLES)(rng, path.read_bytes(), path, sentinel)
        return folder
    folder = Path(shutil.copytree(good["export"], parent / "export"))
    {"weights": a_weight_file, "document": a_document, "manifest": a_manifest}[kind](rng, folder)
    if kind != "manifest" and rng.random() < 0.3:
        (folder / manifest.NAME).write_text(json.dumps(manifest.build(folder)))
    return folder
