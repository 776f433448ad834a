"""The cache of text features: the encoder's own output, resumable, shared by processes, checked."""

import json
from pathlib import Path
from typing import Any

import pytest
from smallrun import SIDE
from textmodels import WIDTH, save_captioned, save_llama

from ldit.cli.main import main
from ldit.codecs import text_features
from ldit.codecs.text import TextEncoder
from ldit.codecs.text_cache import TextCache
from ldit.commands.encode import make_cache
from ldit.config.requests.encode import EncodeRequest
from ldit.config.spec import TextConditionerConfig
from ldit.errors import CodecError, RequestError
from ldit.storage import manifest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama` and `data`, captioned images."""
    base = tmp_path_factory.mktemp("text-cache")
    save_llama(base / "llama")
    save_captioned(base / "data", side=SIDE)
    return base


def request(place: Path, out: Path, **changes: Any) -> EncodeRequest:
    values: dict[str, Any] = {
        "image_size": SIDE, "text": True, "encoder": str(place / "llama"), "max_tokens": 8, "shard_size": 3,
        "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    return EncodeRequest(str(place / "data"), out, **{**values, **changes})


def test_features_are_the_encoders(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts"
    flags = ["--image-size", str(SIDE), "--text", "--encoder", str(place / "llama"), "--max-tokens", "8"]
    assert main(["encode", str(place / "data"), "--out", str(out), *flags, "--shard-size", "3"]) == 0
    cache, encoder = TextCache(out), TextEncoder(TextConditionerConfig(str(place / "llama"), 8))
    rows = [json.loads(line)["text"] for line in (place / "data" / "metadata.jsonl").read_text().splitlines()]
    texts = sorted({text for row in rows for text in ([row] if isinstance(row, str) else row)} | {""})
    assert cache.job.count == len(texts) > 6 and cache.job.width == WIDTH
    for text in texts:
        found = cache.get(text)
        assert found is not None and found.equal(encoder([text]).features[0])
    assert cache.get("not in it") is None
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json",
        *(f"shard-{i:05}.safetensors" for i in range(3)),
    ]
    # A second run of the same command has nothing to do; another encoder, or other texts, are refused.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert make_cache(request(place, out, encoder=str(place / "llama")))
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(RequestError, match="made with max_tokens 8, this command has 9"):
        make_cache(request(place, out, max_tokens=9))


def test_what_was_written_is_kept_after_a_stop(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "texts", tmp_path / "whole"
    assert make_cache(request(place, whole))
    calls: list[int] = []
    encoded = text_features.TextFeatures._encoded

    def stopping(self: Any, texts: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encoded(self, texts)

    monkeypatch.setattr(text_features.TextFeatures, "_encoded", stopping)
    with pytest.raises(KeyboardInterrupt):
        make_cache(request(place, out))
    kept = out / "shard-00000.safetensors"
    with pytest.raises(CodecError, match="is not finished"):
        TextCache(out)
    # One that was damaged meanwhile is made again, the others are not.
    stamp = kept.stat().st_mtime_ns
    assert make_cache(request(place, out)) and kept.stat().st_mtime_ns == stamp
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "note").write_text("x")
    with pytest.raises(RequestError, match="holds note and is no unfinished text cache"):
        make_cache(request(place, other))


def test_a_flipped_bit_is_found(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts"
    assert make_cache(request(place, out))
    for name in sorted(path.name for path in out.iterdir()):
        whole = (out / name).read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 4
        (out / name).write_bytes(data)
        with pytest.raises(CodecError, match=name.replace(".", r"\.")) as caught:
            TextCache(out)
        assert "\n" not in str(caught.value)
        (out / name).write_bytes(whole)
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(CodecError, match="shard-00001"):
        TextCache(out)
    with pytest.raises(CodecError, match="there is no folder"):
        TextCache(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / manifest.NAME).write_text(json.dumps(manifest.sealed({})))
    with pytest.raises(CodecError, match="is not a cache of text features"):
        TextCache(tmp_path / "empty")
