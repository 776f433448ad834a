"""What tells weights apart: the same for the same bytes, with a manifest and without, and another one otherwise."""

import hashlib
from pathlib import Path

import torch
from exports import shard
from pipeline.models import tiny_flow

from ldit.checkpoint.export import write_export
from ldit.checkpoint.fingerprint import weights_fingerprint
from ldit.checkpoint.open import open_source
from ldit.storage import manifest
from ldit.storage.atomic import write_json


def exported(folder: Path, weights: int = 0, ema: int | None = None) -> Path:
    folder.mkdir()
    pipe = tiny_flow(weights)
    apart = None if ema is None else tiny_flow(ema).model.state_dict().items()
    write_export(folder, pipe.spec, pipe.model.state_dict().items(), apart)
    return folder


def found(path: Path, ema: bool = True) -> str:
    return weights_fingerprint(open_source(path), ema)


def test_one_file_is_its_own_checksum(tmp_path: Path) -> None:
    one, same, other = (exported(tmp_path / name, weights) for name, weights in (("a", 0), ("b", 0), ("c", 1)))
    assert found(one) == manifest.sha256_file(one / "model.safetensors") == found(same) != found(other)


def test_averages_are_other_weights(tmp_path: Path) -> None:
    """Where they are kept apart; else there is one kind."""
    both = exported(tmp_path / "both", 0, ema=1)
    assert found(both, ema=True) == manifest.sha256_file(both / "ema.safetensors") != found(both, ema=False)
    assert found(both, ema=False) == found(exported(tmp_path / "raw"), ema=True)


def test_the_manifest_is_believed(tmp_path: Path) -> None:
    """It is compared with the files when those are read, so nothing is read twice."""
    folder = exported(tmp_path / "model")
    plain = found(folder)
    write_json(folder / manifest.NAME, manifest.build(folder))
    assert found(folder) == plain
    record = manifest.Record((folder / "model.safetensors").stat().st_size, "ab" * 32)
    write_json(folder / manifest.NAME, manifest.sealed({"model.safetensors": record}))
    assert found(folder) == "ab" * 32


def test_shards_together(tmp_path: Path) -> None:
    """One of them changed, or two of them exchanged, is another model."""
    folder = exported(tmp_path / "model")
    shard(folder, {name: t.clone() for name, t in tiny_flow().model.state_dict().items()})
    names = sorted(path.name for path in folder.glob("model-*.safetensors"))
    lines = "".join(f"{name} {manifest.sha256_file(folder / name)}\n" for name in names)
    whole = found(folder)
    assert whole == hashlib.sha256(lines.encode()).hexdigest()
    data = bytearray((folder / names[1]).read_bytes())
    data[-1] ^= 1
    (folder / names[1]).write_bytes(bytes(data))
    assert found(folder) != whole


def test_files_of_others(tmp_path: Path) -> None:
    """A .pt is its own checksum; of a pipeline the network counts, of the original's folder the kind asked for."""
    pipe = tiny_flow()
    torch.save(pipe.model.state_dict(), tmp_path / "any.pt")
    source = open_source(exported(tmp_path / "model"))
    pt = type(source)("dit-pt", tmp_path / "any.pt", source.spec, ("raw",))
    assert weights_fingerprint(pt, True) == manifest.sha256_file(tmp_path / "any.pt")
    part = tmp_path / "pipeline/transformer"
    part.mkdir(parents=True)
    (part / "diffusion_pytorch_model.bin").write_bytes(b"weights")
    pipeline = type(source)("diffusers", tmp_path / "pipeline", source.spec, ("raw",))
    assert weights_fingerprint(pipeline, True) == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "pipeline/consolidated.00-of-01.pth").write_bytes(b"raw")
    (tmp_path / "pipeline/consolidated_ema.00-of-01.pth").write_bytes(b"averages")
    original = type(source)("original", tmp_path / "pipeline", source.spec, ("raw", "ema"))
    for ema, content in ((True, b"averages"), (False, b"raw")):
        assert weights_fingerprint(original, ema) == hashlib.sha256(content).hexdigest()
