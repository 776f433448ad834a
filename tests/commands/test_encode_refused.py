"""What `ldit encode` refuses: another job over an old cache, places that are no place, numbers that cannot be."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands.encoding import (
    SIZE,
    FakeCodec,
    contents,
    job,
    refused,
    whole,
)

from ldit.data.latent_cache import job as cache_job
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError, RequestError, SourceError

OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 12}, "size 8, this command has 12"),
    ({"dtype": "fp32"}, "dtype bf16, this command has fp32"),
    ({"precision": "bf16"}, "precision fp32, this command has bf16"),
    ({"shard_size": 5}, "shard_size 4, this command has 5"),
    ({"exif": True}, "source.decoding.exif False, this command has True"),
    ({"heldout": ""}, "source.pictures 10, this command has 13"),
]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("options", "message"), OTHERS, ids=[str(o) for o, _ in OTHERS])
def test_another_job_is_refused(
    source: Path,
    tmp_path: Path,
    run: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    finished: bool,
    options: dict[str, Any],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert run(job(source, out), world=1 if finished else 2) == finished
    before = contents(out)
    assert message in refused(monkeypatch, job(source, out, **options))
    assert contents(out) == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_codec_is_refused_with_both_fingerprints(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    out = tmp_path / "out"
    assert run(job(source, out), world=1 if finished else 2) == finished
    said = refused(monkeypatch, job(source, out), FakeCodec("other"))
    digits = [FakeCodec(name).fingerprint()[:12] for name in ("fake", "other")]
    assert re.search(".*".join(digits), said) and FakeCodec().fingerprint() not in said


def test_other_images_are_refused_with_both_fingerprints(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert not run(job(source, out), world=2)
    before = open_data(str(source), SIZE)[0].fingerprint()
    os.rename(source / "a/00.png", source / "a/77.png")
    after = open_data(str(source), SIZE)[0].fingerprint()
    assert re.search(f"source.sha256 {before[:12]}, .*{after[:12]}", refused(monkeypatch, job(source, out)))


def test_places_that_are_no_place(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    before = whole(source, cache, run)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/shard-00000.safetensors").write_text("somebody's")
    for place, word in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "notes.txt"),
        (tmp_path / "shards", "shard-00000"),
        (cache / "inside", "sealed"),
        (cache / "heldout/inside", "sealed"),
        (cache / "heldout", "sealed"),
        (source / "cache", "is inside"),
        (source, "is"),
        (source.parent, "contains"),
        (tmp_path / "run/cache", "is inside the run"),
        (tmp_path / "run", "is inside the run"),
    ):
        assert word in refused(monkeypatch, job(source, place)), place
    assert contents(cache) == before and contents(tmp_path / "full") == {"notes.txt": b"mine"}
    assert sorted(p.name for p in source.iterdir()) == ["a", "b", "heldout.txt"]
    (cache / "manifest.json").write_text("{")
    assert "sealed" in refused(monkeypatch, job(source, cache))


def test_a_cache_is_no_source(source: Path, tmp_path: Path, run: Callable[..., bool]) -> None:
    whole(source, tmp_path / "cache", run)
    with pytest.raises(DataError, match="is a latent cache"):
        run(job(tmp_path / "cache", tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"image_size": 10}, "--image-size: 10 is not a multiple"),
        ({"image_size": 0}, "--image-size"),
        ({"shard_size": 0}, "--shard-size"),
        ({"batch_size": 0}, "--batch-size"),
        ({"workers": -1}, "--workers"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
        ({"background": (0, 0, 256)}, "--background"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"device": "meta"}, "device 'meta'"),
    ],
)
def test_numbers_that_cannot_be(
    source: Path, tmp_path: Path, run: Callable[..., bool], options: dict[str, Any], word: str
) -> None:
    with pytest.raises((ConfigError, RequestError), match=re.escape(word)):
        run(job(source, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_damaged_job_is_named(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert not run(job(source, out), world=2)
    text = (out / "encode.json").read_text()
    (out / "encode.json").write_text(text.replace('"adm-center"', '"adm-centre"'))
    with pytest.raises(SourceError, match=r"encode\.json is damaged"):
        run(job(source, out))


def test_a_cache_made_whole_by_another_at_that_moment(
    source: Path, tmp_path: Path, run: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest that appears while a late process looks at the folder is a cache's, not something else's."""
    out, sound, body = tmp_path / "out", cache_job.is_cache, b""
    assert run(job(source, out))
    body = (out / "manifest.json").read_bytes()
    (out / "manifest.json").unlink()
    (out / "encode.json").write_text("{}")

    def looking(root: Path) -> bool:
        found = sound(root)
        (out / "manifest.json").write_bytes(body)
        return found

    monkeypatch.setattr(cache_job, "is_cache", looking)
    cache_job.check_cache_dir(out, source)
