"""Tar archives, sound and hostile, from headers made by hand: case i is drawn from seed i."""

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from PIL import Image

END = bytes(1024)
HUGE = [2**33, 2**40, 2**62, 2**63, 2**87]
Parts = list[bytes | int]  # bytes, and lengths of holes


def png(color: int = 0, side: int = 4) -> bytes:
    """A grey image file."""
    out = io.BytesIO()
    Image.new("RGB", (side, side), (color,) * 3).save(out, "PNG")
    return out.getvalue()


PNG = png()


def octal(number: int, width: int = 12) -> bytes:
    return b"%0*o\0" % (width - 1, number)


def base256(number: int, width: int = 12) -> bytes:
    """GNU's binary number: 0x80 and big-endian, or two's complement for a negative one."""
    return b"\x80" + number.to_bytes(width - 1, "big") if number >= 0 else number.to_bytes(width, "big", signed=True)


def header(
    name: bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    prefix: bytes = b"",
    magic: bytes = b"ustar\x0000",
    link: bytes = b"",
    signed: bool = False,
) -> bytes:
    """512 bytes with a true checksum; `size` as bytes is the field itself."""
    block = bytearray(512)
    block[0:100] = name[:100].ljust(100, b"\0")
    block[100:124] = octal(0o644, 8) + octal(1000, 8) * 2
    block[124:136] = (octal(size) if isinstance(size, int) else size).ljust(12, b"\0")[:12]
    block[136:148] = octal(1_600_000_000)
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157:257] = link[:100].ljust(100, b"\0")
    block[257:265] = magic.ljust(8, b"\0")
    block[345:500] = prefix[:155].ljust(155, b"\0")
    total = sum(struct.unpack("512b", block)) if signed else sum(block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes = PNG, **header_fields: bytes | bool) -> bytes:
    """A whole member."""
    return header(name, len(data), **header_fields) + padded(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    """A record of a pax header, whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return member(b"PaxHeaders/x", records, kind=kind)


def long_name(name: bytes) -> bytes:
    return member(b"././@LongLink", name + b"\0", kind=b"L", magic=b"ustar  \0")


def good(rng: random.Random, count: int | None = None, prefix: str = "good") -> list[bytes]:
    """Sound samples with the classes 0, 1, 0, 1, …, at least two."""
    samples = range(count or rng.randint(2, 6))
    pairs = [
        (member(f"{prefix}/{i:03}.png".encode()), member(f"{prefix}/{i:03}.cls".encode(), b"%d" % (i % 2)))
        for i in samples
    ]
    return [block for pair in pairs for block in pair]


# ---------------------------------------------------------------- each: (parts, what the error must say)

Hostile = tuple[Parts, str]


def climbing(rng: random.Random) -> bytes:
    """A name that leads out of its folder."""
    return rng.choice([b"../evil.png", b"a/../../evil.png", b"a/b/../evil.png", b"a/..", b"..", b"./../evil.png"])


def absolute_name(rng: random.Random) -> bytes:
    return rng.choice([b"/etc/evil.png", b"//evil.png", b"/evil.cls", b"/"])


def dotdot(rng: random.Random) -> Hostile:
    name = climbing(rng)
    return [member(name)], name.decode()


def absolute(rng: random.Random) -> Hostile:
    name = absolute_name(rng)
    return [member(name)], name.decode()


def dotdot_folder(rng: random.Random) -> Hostile:
    return [header(b"../evil/", 0, b"5")], "../evil"


def dotdot_by_pax(rng: random.Random) -> Hostile:
    name = rng.choice([climbing, absolute_name])(rng)
    return [pax(record(b"path", name)), member(b"innocent.png")], name.decode()


def dotdot_by_long_name(rng: random.Random) -> Hostile:
    name = rng.choice([climbing, absolute_name])(rng)
    return [long_name(name), member(b"innocent.png")], name.decode()


def dotdot_by_prefix(rng: random.Random) -> Hostile:
    prefix = rng.choice([b"..", b"a/..", b"/etc"])
    return [member(b"evil.png", prefix=prefix)], f"{prefix.decode()}/evil.png"


def symbolic_link(rng: random.Random) -> Hostile:
    return [
        header(b"evil.png", 0, b"2", link=rng.choice([b"/etc/passwd", b"../../x", b"good/000.png"]))
    ], "evil.png' is a symbolic link"


def hard_link(rng: random.Random) -> Hostile:
    return [header(b"evil.png", rng.choice([0, 0, 512]), b"1", link=b"good/000.png"), bytes(512)], "evil.png' is a hard"


def long_link(rng: random.Random) -> Hostile:
    link = member(b"././@LongLink", b"/etc/passwd\0", kind=b"K")
    return [link, header(b"evil.png", 0, b"2")], "a symbolic link"


def pax_link(rng: random.Random) -> Hostile:
    return [pax(record(b"linkpath", b"/etc/passwd")), header(b"evil.png", 0, b"2")], "a symbolic link"


def device(rng: random.Random) -> Hostile:
    return [header(b"evil.png", 0, rng.choice([b"3", b"4"]))], "evil.png"


def fifo(rng: random.Random) -> Hostile:
    return [header(b"evil.png", 0, b"6")], "evil.png' is a FIFO"


def sparse(rng: random.Random) -> Hostile:
    return [header(b"evil.png", 512, b"S", magic=b"ustar  \0"), bytes(512)], "evil.png"


def sparse_by_pax(rng: random.Random) -> Hostile:
    keys = rng.choice([[b"GNU.sparse.major", b"GNU.sparse.minor"], [b"GNU.sparse.size"], [b"GNU.sparse.map"]])
    return [pax(b"".join(record(key, b"1") for key in keys)), member(b"evil.png")], "sparse"


def unknown_kind(rng: random.Random) -> Hostile:
    return [member(b"evil.png", kind=rng.choice([b"N", b"A", b"D", b"V", b"8", b"\xff", b" "]))], "evil.png"


def beyond_the_end(rng: random.Random) -> Hostile:
    size = rng.choice([100_000, 2**20, 2**31, 2**33 - 1]) + rng.randrange(1000)
    return [header(rng.choice([b"evil.png", b"evil.cls", b"evil.txt"]), min(size, 2**33 - 1)), PNG], "evil."


def huge_size(rng: random.Random) -> Hostile:
    return [header(b"evil.png", base256(rng.choice(HUGE)))], "evil.png"


def negative_size(rng: random.Random) -> Hostile:
    return [header(b"evil.png", base256(-rng.choice([1, 512, 1024, 2**62])))], "evil.png' claims -"


def no_number(rng: random.Random) -> Hostile:
    fields = [
        b"-0000001000\0",
        b"00000000x00\0",
        b"9\0",
        b"0x200\0",
        b"1e3\0",
        b"12 12\0",
        b"\xc0" + bytes(11),
    ]
    return [header(b"evil.png", rng.choice(fields)), padded(PNG)], ""


def blank_size(rng: random.Random) -> Hostile:
    return [header(b"evil.png", rng.choice([b" " * 12, bytes(12), b"  \0\0"])), padded(PNG)], "no tar header"


def huge_pax(rng: random.Random) -> Hostile:
    """A header that claims gigabytes which are not there."""
    size = rng.choice([octal(2**32), octal(2**33 - 1), base256(2**40), base256(2**62)])
    return [header(b"PaxHeaders/evil", size, rng.choice([b"x", b"g"]))], "an extended header of"


def large_pax(rng: random.Random) -> Hostile:
    """A header of hundreds of megabytes, in a hole of the disk."""
    size = (200 << 20) + 512 * rng.randrange(1000)
    return [header(b"PaxHeaders/evil", size, b"x"), size, member(b"a.png")], "an extended header of"


def huge_long_name(rng: random.Random) -> Hostile:
    size = rng.choice([octal(2**32), octal(2**33 - 1), base256(2**40), base256(2**62)])
    return [header(b"././@LongLink", size, b"L")], "an extended header of"


def large_long_name(rng: random.Random) -> Hostile:
    size = (200 << 20) + 512 * rng.randrange(1000)
    return [header(b"././@LongLink", size, b"L"), size, member(b"a.png")], "an extended header of"


def long_pax_name(rng: random.Random) -> Hostile:
    return [pax(record(b"path", b"a/" * rng.randint(2049, 5000) + b"x.png")), member(b"a.png")], "a/a/a"


def pax_size(rng: random.Random) -> Hostile:
    size = rng.choice([b"-1", b"0x10", b"", b"1.5", b"1e9", b"9" * 20, b"9" * 5000, b"99999999999"])
    return [pax(record(b"size", size)), member(b"evil.png")], ""


def global_name(rng: random.Random) -> Hostile:
    key = rng.choice([b"path", b"size"])
    return [pax(record(key, b"100"), b"g"), member(b"evil.png")], key.decode()


def zero_in_name(rng: random.Random) -> Hostile:
    return [pax(record(b"path", b"evil.png\0.txt")), member(b"a.png")], "evil.png"


def no_name(rng: random.Random) -> Hostile:
    return rng.choice(
        [
            ([member(b"")], "no name"),
            ([member(b"./")], "no name"),
            ([pax(record(b"path", b"")), member(b"a.png")], "no name"),
        ]
    )


def extended_at_the_end(rng: random.Random) -> Hostile:
    return [rng.choice([pax(record(b"path", b"a.png")), long_name(b"b.png")]), END, -1], "no tar header"


def same_name(rng: random.Random) -> Hostile:
    twin = rng.choice([b"good/000.png", b"./good/000.png", b"good//000.png", b"good/./000.png", b"good/000.PNG"])
    return [member(twin)], "good/000."


def second_image(rng: random.Random) -> Hostile:
    return [member(rng.choice([b"good/000.jpg", b"good/000.jpeg", b"good/000.gif"]))], "good/000."


def second_label(rng: random.Random) -> Hostile:
    return [member(b"good/000.cls", b"1")], "good/000.cls"


def lost(rng: random.Random) -> Hostile:
    name, data = rng.choice([(b"evil.v2.png", PNG), (b"evil.cls", b"1")])
    return [member(name, data)], name.decode()


def bad_label(rng: random.Random) -> Hostile:
    labels = [
        b"-1",
        b"9" * 4000,
        b"2147483648",
        b"",
        b" \n",
        b"\xff\xfe",
        b"a\nb",
        b"x" * 1001,
        b"x" * 5000,
        b"\x1b[2J",
    ]
    return [member(b"evil.png"), member(b"evil.cls", rng.choice(labels))], "evil.cls"


def bad_object(rng: random.Random) -> Hostile:
    texts = [
        b"[" * 100_000,
        b'{"label":' * 50_000,
        b'{"label": ' + b"9" * 5000 + b"}",
        b'{"label": 1e400}',
        b"[1]",
        b"{",
        b"7",
    ]
    texts += [b'{"label": true}', b'{"label": "\\ud800"}', b'{"label": -1}', b'{"class": []}', b'{"cls": ""}', b"\xff"]
    texts += [json.dumps({"label": 1, "x": "y" * (1 << 20)}).encode()]
    return [member(b"evil.png"), member(b"evil.json", rng.choice(texts))], "evil.json"


def false_checksum(rng: random.Random) -> Hostile:
    block = bytearray(member(b"evil.png"))
    block[rng.choice([0, 5, 124, 150, 156, 300, 500])] ^= 1 << rng.randrange(7)
    return [bytes(block)], "no tar header"


def large_image(rng: random.Random) -> Hostile:
    """More bytes than an image may have, in a hole of the disk."""
    size = (1 << 28) + 512 * rng.randint(1, 1 << 20)
    return [header(b"evil.png", size), size], "evil.png"


def glued(rng: random.Random) -> Hostile:
    return [bytes(512 * rng.randint(1, 20)), *good(rng, 2, "more"), END, -1], "joined"


def noise(rng: random.Random) -> Hostile:
    return [rng.randbytes(rng.choice([1, 100, 511, 512, 513, 5000]))], ""


KINDS: list[Callable[[random.Random], Hostile]] = [
    dotdot, absolute, dotdot_folder, dotdot_by_pax, dotdot_by_long_name, dotdot_by_prefix, symbolic_link, hard_link,
    long_link, pax_link, device, fifo, sparse, sparse_by_pax, unknown_kind, beyond_the_end, huge_size, negative_size,
    no_number, blank_size, huge_pax, large_pax, huge_long_name, large_long_name, long_pax_name, pax_size,
    global_name, zero_in_name, no_name, extended_at_the_end, same_name, second_image,
    second_label, lost, bad_label, bad_object, false_checksum, large_image, glued, noise,
]  # fmt: skip


def truncated(rng: random.Random) -> bytes:
    """A sound archive cut anywhere before its end mark is whole."""
    whole = b"".join(good(rng))
    return (whole + END)[: rng.randint(1, len(whole) + 511)]


def write(path: Path, parts: Parts) -> None:
    """Parts one after another; holes take no room on the disk."""
    with path.open("wb") as file:
        for part in parts:
            if isinstance(part, int):
                file.seek(part, 1)
                file.truncate()
            else:
                file.write(part)


def make(case: int, path: Path) -> tuple[str, str]:
    """Write hostile archive number `case`; returns (what it is, what its error must say)."""
    rng = random.Random(case)
    number = case % (len(KINDS) + 1)
    if number == len(KINDS):
        path.write_bytes(truncated(rng))
        return "truncated", ""
    parts, said = KINDS[number](rng)
    before = good(rng)
    if parts[-1] == -1:  # brings its own end
        write(path, [*before, *parts[:-1]])
    else:
        write(path, [*before, *parts, *(good(rng, 2, "after") if rng.random() < 0.5 else []), END])
    return KINDS[number].__name__, said
