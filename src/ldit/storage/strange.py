"""What lies at a path where something else was expected: the usual accidents of downloads, in plain words."""

from pathlib import Path

_HEAD = 1024  # bytes that are looked at


def what_is_it(path: Path) -> str:
    """A phrase for "PATH …" that says what a file is and what to do, if it is one of the usual accidents; "" for
    anything else, and for what cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return ""
    return strange(head)


def damaged(path: Path, error: object) -> str:
    """A message about a file that cannot be read: what it is instead, else that it is damaged, with the error."""
    why = what_is_it(path)
    return f"{path} {why}" if why else f"{path} is damaged: {error}"


def strange(head: bytes) -> str:
    """`what_is_it` for the first bytes of a file."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if not head:
        return "is damaged: it is empty, its download or copy did not finish"
    if text.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "is a web page, not the file itself: the download saved the page around it"
    if text.startswith((b"<?xml", b"<svg")):
        return "is XML, such as a server's error message or an SVG drawing"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")):
        return "is packed: unpack it first (gunzip, bunzip2, unxz, unzstd)"
    if not head.strip(b"\0"):
        return "is damaged: it begins with zeros alone, its download or copy did not finish"
    return ""
