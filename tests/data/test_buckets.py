"""Aspect buckets: sizes and choice by the original's rule, one bucket a batch, an order that nothing changes."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from smallrun import SIDE, Images, small
from textmodels import WIDTH, save_captioned, save_llama

from ldit.commands.train import train
from ldit.config.model import TextModelConfig
from ldit.config.run import RunConfig
from ldit.config.sections import TextConfig
from ldit.data.buckets import Bucketed, BucketOrder, best_buckets, bucket_sizes
from ldit.data.loader import Loader
from ldit.data.samples import Captioned
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError

GOLDEN = Path(__file__).parent.parent / "golden" / "buckets.json"


@pytest.mark.parametrize("size", [64, 256, 512, 1024])
def test_sizes_equal_the_rule(size: int) -> None:
    listed = [tuple(pair) for pair in json.loads(GOLDEN.read_text())[str(size)]]
    assert list(bucket_sizes(size, 16)) == listed and len(listed) == {64: 13, 256: 49, 512: 97, 1024: 193}[size]
    most = max((w // 16 + 1) * (h // 16) for w, h in listed)
    side = size // 16
    assert most <= side * side + 2 * side  # the tokens that original.md states


def test_choice_and_crop_equal_the_rule(tmp_path: Path) -> None:
    sizes = bucket_sizes(64, 16)
    random = np.random.RandomState(0)
    for k, (w, h) in enumerate([(64, 64), (300, 100), (100, 400), (63, 130), (20, 20), (2000, 500)]):
        shares = [(min(cw / w, ch / h) / max(cw / w, ch / h), (cw, ch)) for cw, ch in sizes]
        expected = [pair for _, pair in sorted(shares, reverse=True)[:4]]
        assert [sizes[i] for i in best_buckets((w, h), sizes)] == expected
        image = Image.fromarray(random.randint(0, 256, (h, w, 3)).astype(np.uint8))
        image.save(tmp_path / f"{k}.png")
        data = Bucketed(open_data(str(tmp_path), 64)[0], sizes)
        assert [sizes[i] for i in data.choices[k]] == expected
        for cw, ch in expected:
            out = np.empty((3, ch, cw), np.float32)
            data.read(k, False, out, (0.999, 0.0))
            cut = image
            while cut.width >= 2 * cw and cut.height >= 2 * ch:
                cut = cut.resize((cut.width // 2, cut.height // 2), Image.Resampling.BOX)
            scale = max(cw / cut.width, ch / cut.height)
            cut = cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.Resampling.BICUBIC)
            cut = cut.crop((cut.width - cw, 0, cut.width, ch))  # the last place to the right, the first from above
            assert np.array_equal(np.rint((out + 1) * 127.5).transpose(1, 2, 0), np.asarray(cut))


def test_every_batch_is_of_one_bucket() -> None:
    random = np.random.RandomState(1)
    # Two buckets of many images, one of few, and images that may go to several.
    choices = np.array([[0] * 4] * 50 + [[1, 1, 2, 2]] * 41 + [[3] * 4] * 3, np.int16)[random.permutation(94)]
    order = BucketOrder(choices, 8, seed=3)
    assert order.batches == 11
    seen: Counter[int] = Counter()
    for step in range(3 * order.batches):
        indices = order.between(step * 8, step * 8 + 8)
        bucket = order.bucket_at(step * 8)
        assert all(bucket in choices[index] for index in indices)
        seen.update(indices)
    assert max(seen.values()) <= 6 and sum(seen.values()) == 3 * 88
    assert sum(index in seen for index in range(94)) >= 88  # of three epochs
    # The same from anywhere, by any process; another epoch and another seed give another order.
    again = BucketOrder(choices, 8, seed=3)
    assert again.between(88 * 2 + 5, 88 * 2 + 19) == order.between(88 * 2 + 5, 88 * 2 + 19)
    assert order.between(0, 88) != order.between(88, 176) != BucketOrder(choices, 8, seed=4).between(88, 176)
    # Fewer images than a batch: it is filled up.
    few = BucketOrder(choices[:5], 8, seed=0)
    assert few.batches == 1 and len(few.between(0, 16)) == 16


def save_shapes(root: Path) -> Path:
    """Captioned images of several shapes."""
    save_captioned(root, count=18)
    random = np.random.RandomState(4)
    for i in range(18):
        shape = [(SIDE, SIDE, 3), (SIDE // 2, 2 * SIDE, 3), (2 * SIDE, SIDE // 2, 3)][i % 3]
        Image.fromarray(random.randint(0, 256, shape).astype(np.uint8)).save(root / f"{i:02}.png")
    return root


def test_batches_of_parts_and_of_a_resume(tmp_path: Path) -> None:
    images, _ = open_data(str(save_shapes(tmp_path / "data")), SIDE)
    data = Bucketed(Captioned(images), bucket_sizes(SIDE, 2))
    again = Bucketed(Captioned(images), bucket_sizes(SIDE, 2))
    assert data.fingerprint() == again.fingerprint() != Captioned(images).fingerprint() and data.names == ()
    assert data.fingerprint() != Bucketed(Captioned(images), bucket_sizes(2 * SIDE, 2)).fingerprint()
    whole = list(Loader(data, 4, 7, True, workers=2).from_step(0, 9))
    assert len({tuple(batch.inputs.shape[2:]) for batch in whole}) > 2
    parts = [list(Loader(data, 4, 7, True, workers=0, part=part, parts=2).from_step(3, 9)) for part in (0, 1)]
    for step in range(6):
        both = torch.cat([part[step].inputs for part in parts])
        assert both.equal(whole[3 + step].inputs)
        assert torch.cat([part[step].labels for part in parts]).equal(whole[3 + step].labels)
    with pytest.raises(DataError, match="not made of image files"):
        Bucketed(Images(), ())


def test_runs_in_buckets_resume_exactly(tmp_path: Path) -> None:
    data, llama = save_shapes(tmp_path / "data"), save_llama(tmp_path / "llama")

    def config(steps: int, of_text: bool) -> RunConfig:
        changes = {
            "data.path": str(data), "data.buckets": True, "train.batch_size": 4, "train.steps": steps,
            "model.num_classes": 0, "model.rope": "2d",
        }  # fmt: skip
        base = small(changes)
        if not of_text:
            return base
        side = SIDE // 2
        model = TextModelConfig(
            patch_size=2, in_channels=3, dim=16, n_layers=1, n_heads=2, multiple_of=16,
            max_seq_len=side * side + 2 * side, cap_feat_dim=WIDTH, rope="2d",
        )  # fmt: skip
        return replace(base, model=model, text=TextConfig(str(llama), max_tokens=8))

    for of_text in (False, True):
        runs = [tmp_path / f"{of_text}-{name}" for name in ("whole", "part")]
        train(config(6, of_text), runs[0])
        for steps in (2, 6):
            train(config(steps, of_text), runs[1])
        lines = [
            [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
            for run in runs
        ]
        assert len(lines[0]) == 6 and lines[0] == lines[1]


def test_what_buckets_exclude(tmp_path: Path) -> None:
    changes = {"data.path": str(tmp_path), "data.buckets": True, "objective.augment": 0.1, "model.augment_labels": True}
    with pytest.raises(ConfigError, match=r"data\.buckets: does not go with objective\.augment"):
        small(changes).check()
    changes = {
        "data.path": str(tmp_path),
        "data.buckets": True,
        "objective.route": 0.5,
        "objective.route_blocks": (1, 1),
    }
    with pytest.raises(ConfigError, match=r"data\.buckets: does not go with objective\.route"):
        small({**changes, "objective.route_blocks": (1, 1)}).check()
    base = small({"data.path": str(tmp_path), "data.buckets": True, "data.fit_model": True})
    text = replace(base, model=TextModelConfig(patch_size=2, in_channels=3, dim=16, n_layers=1, n_heads=2))
    side = SIDE // 2
    assert isinstance(fitted := text.fitted(0).model, TextModelConfig) and fitted.max_seq_len == side * side + 2 * side
    text.check()
