"""Folders in our layout whose sets are split over several files, as several processes leave them; a tiny model of the
original."""

from pathlib import Path

from torch import Tensor

from ldit.config.model import ClassModelConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig, ModelSpec
from ldit.storage.atomic import write_json
from ldit.storage.shards import ShardWriter, shard_name, write_index

ORIGINAL = ModelSpec(
    ClassModelConfig(dim=16, n_layers=1, n_heads=2, multiple_of=8, input_size=8, num_classes=3),
    DDPMConfig(),
    AutoencoderConfig("stabilityai/sd-vae-ft-ema"),
)


def write_sharded(folder: Path, stem: str, tensors: dict[str, Tensor], parts: int = 3) -> list[str]:
    """STEM-0000i-of-0000n.safetensors and their index; the names of the files."""
    table: dict[str, str] = {}
    names = list(tensors)
    for part in range(parts):
        mine = names[part * len(names) // parts : (part + 1) * len(names) // parts]
        file = shard_name(stem, part, parts)
        with ShardWriter(folder / file, [(n, tensors[n].dtype, tuple(tensors[n].shape)) for n in mine]) as writer:
            for name in mine:
                writer.add(tensors[name])
        table.update(dict.fromkeys(mine, file))
    write_index(folder, stem, table, sum(t.nbytes for t in tensors.values()))
    return sorted(set(table.values()))


def write_folder(folder: Path, spec: ModelSpec, sets: dict[str, dict[str, Tensor]]) -> None:
    """An export of the model whole and its averages in three shards."""
    write_json(folder / "config.json", spec.to_json())
    write_sharded(folder, "model", sets["model"], 1)
    (folder / "model.safetensors.index.json").unlink()
    write_sharded(folder, "ema", sets["ema"], 3)
