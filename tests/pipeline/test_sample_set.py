"""Sets of images: what is in them, the same set at any number of processes and cores, labels, blocks without files."""

import json
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline.models import MODEL, tiny, tiny_flow
from pipeline.sets import BATCH, BLOCKS, KINDS, NUM, OPTIONS, contents, described, exported, job, made
from smallrun import one_thread

from ldit.config.spec import ClassConditionerConfig, FlowConfig, SamplingConfig
from ldit.errors import RequestError
from ldit.pipeline.load import Pipeline, load
from ldit.pipeline.sets import make as flow
from ldit.pipeline.sets.job import Labels
from ldit.pipeline.sets.make import BlockSampler, SampleSet
from ldit.storage import manifest


def expected(pipe: Pipeline, labels: list[int], seeds: list[int], **options: Any) -> np.ndarray:
    """(N, H, W, 3), each batch of four as one request of the pipeline."""
    taken: list[np.ndarray] = []
    with one_thread():
        for first in range(0, len(labels), BATCH):
            rows = slice(first, first + BATCH)
            images = pipe(labels[rows], seeds=seeds[rows], steps=3, **options)
            taken += [np.asarray(image) for image in images]
    return np.stack(taken)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_their_seeds_and_labels(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Bit for bit what the pipeline gives for each block; as PNGs and as the array of the field's evaluators."""
    out, labels = tmp_path / kind, [k % 4 for k in range(NUM)]
    assert made(monkeypatch, job(source), out)
    wanted = expected(load(source, "cpu"), labels, [5 + k for k in range(NUM)])
    assert len(np.unique(wanted.reshape(NUM, -1), axis=0)) == NUM
    said = described(out)
    if kind == "set":
        assert sorted(path.name for path in out.iterdir()) == [*(f"{k:06d}.png" for k in range(NUM)), "samples.json"]
        assert np.array_equal(np.stack([np.asarray(Image.open(out / f"{k:06d}.png")) for k in range(NUM)]), wanted)
        with Image.open(out / "000006.png") as picture:
            inside = json.loads(picture.text["ldit"])  # type: ignore[attr-defined]
        assert (inside["seed"], inside["label"], inside["source"], inside["sampling"]["steps"]) == (11, 2, "model", "3")
    else:
        with np.load(out, allow_pickle=False) as arrays:
            assert arrays.files == ["arr_0", "arr_1"]
            assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"], wanted)
            assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == labels
        assert {path.name for path in tmp_path.iterdir()} == {kind, f"{kind}.json"}
        with zipfile.ZipFile(out) as archive:
            assert archive.testzip() is None and {e.compress_type for e in archive.infolist()} == {zipfile.ZIP_STORED}
            assert {e.date_time for e in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # of no clock
    assert said["complete"] and said["labels"] == labels and said["num"] == NUM and said["size"] == [8, 8]
    assert (said["label_rule"], said["classes"], said["dtype"], said["seed"]) == ("balanced", None, "fp32", 5)
    assert said["weights"] == manifest.sha256_file(source / "model.safetensors")
    assert str(tmp_path) not in json.dumps(said) and str(source) not in json.dumps(said) and "cpu" not in said.values()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "cores"), [(1, 1), (1, 3), (2, 2), (4, 1), (7, 1)])
def test_processes_and_cores_change_nothing(
    source: Path, whole: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, world: int, cores: int,
) -> None:  # fmt: skip
    """In any order of the processes, of which one may have nothing to do; each makes every n-th block."""
    out, before, sound = tmp_path / kind, torch.get_num_threads(), BlockSampler._block
    ended, numbers = [], []

    def block(self: BlockSampler, number: int, stopped: threading.Event) -> Any:
        numbers.append(number)
        return sound(self, number, stopped)

    monkeypatch.setattr(BlockSampler, "_block", block)
    try:
        torch.set_num_threads(cores)
        for rank in reversed(range(world)):
            numbers.clear()
            ended.append(made(monkeypatch, job(source), out, rank, world))
            assert sorted(numbers) == list(range(rank, BLOCKS, world))
        assert torch.get_num_threads() == cores
    finally:
        torch.set_num_threads(before)
    assert ended == [False] * (world - 1) + [True] and contents(out) == whole[kind]


def test_sums_that_depend_on_threads_do_not_reach_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network wide enough for three threads to share its sums otherwise than one has them. The last bits of the
    images are looked at, which 8 bits seldom show."""
    monkeypatch.setattr(flow, "to_uint8", lambda t: (t.contiguous().view(torch.int32) & 255).to(torch.uint8))
    wide = replace(MODEL, dim=128, n_heads=4, input_size=32, learn_sigma=False)
    source = exported(tmp_path / "wide", tiny(wide, process=FlowConfig(), sampling=SamplingConfig("euler", 2, 2.0)))
    before, found = torch.get_num_threads(), []
    try:
        for cores in (1, 3):
            torch.set_num_threads(cores)
            assert made(monkeypatch, job(source, 12, options={"steps": "2"}), tmp_path / f"{cores}.npz")
            found.append((tmp_path / f"{cores}.npz").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


# ---- labels


def test_random_labels_depend_on_seed_and_number_alone() -> None:
    """Uniform: each of four classes within five deviations of 1000 of 4000."""
    labels = Labels("random", (0, 1, 2, 3), 7)
    drawn = labels.of(range(4000))
    assert drawn[100:107] == labels.of(range(100, 107)) and drawn != Labels("random", (0, 1, 2, 3), 8).of(range(4000))
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in Counter(drawn).values())
    assert set(Labels("random", (5, 9), 0).of(range(50))) == {5, 9}


def test_balanced_labels_are_never_sorted() -> None:
    """Any stretch as long as there are classes has each once."""
    labels = Labels("balanced", tuple(range(10)), 0).of(range(1000))
    assert all(len(set(labels[first : first + 10])) == 10 for first in range(990))


@pytest.mark.parametrize(
    ("rule", "named", "wanted"),
    [
        ("random", (), Labels("random", (0, 1, 2, 3), 5).of(range(10))),
        (None, ("dog", "1", "dog"), (3, 1, 3) * 3 + (3,)),
        ("random", ("bee", "cat"), Labels("random", (1, 2), 5).of(range(10))),
    ],
)
def test_labels_of_a_set(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Any, named: tuple[str, ...], wanted: Any
) -> None:
    assert made(monkeypatch, job(source, 10, labels=rule, class_labels=named), tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as arrays:
        assert tuple(arrays["arr_1"]) == wanted
        assert np.array_equal(arrays["arr_0"], expected(load(source, "cpu"), list(wanted), list(range(5, 15))))
    said = described(tmp_path / "set.npz")
    assert said["label_rule"] == (rule or "balanced") and tuple(said["labels"]) == wanted


def test_models_without_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(MODEL, num_classes=0, learn_sigma=False)
    pipe = tiny(model, process=FlowConfig(), conditioner=ClassConditionerConfig(None), sampling=None)
    source = exported(tmp_path / "model", pipe)
    assert made(monkeypatch, job(source, 6), tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as arrays:
        assert arrays.files == ["arr_0"] and len(np.unique(arrays["arr_0"].reshape(6, -1), axis=0)) == 6
    assert "labels" not in described(tmp_path / "set.npz")
    for changes in ({"labels": "balanced"}, {"class_labels": ("1",)}):
        with pytest.raises(RequestError, match="this model has no classes"):
            made(monkeypatch, job(source, 6, **changes), tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- blocks without files


@pytest.mark.parametrize("make", [tiny, tiny_flow])
@pytest.mark.parametrize("interval", [None, (0.3, 0.8)])
def test_blocks_and_what_they_cost(tmp_path: Path, make: Callable[..., Pipeline], interval: Any) -> None:
    """The description knows beforehand how many evaluations each image takes."""
    options = {**OPTIONS, **({} if interval is None else {"guidance_interval": interval})}
    asked = SampleSet(job(exported(tmp_path / "model", make()), options=options), NUM)
    sampler = asked.sampler()
    blocks = list(sampler.blocks(range(1, BLOCKS, 2)))
    assert [block.rows for block in blocks] == [range(4, 8), range(12, 16), range(20, 22)]
    assert all(block.images.shape == (len(block.rows), 3, 8, 8) for block in blocks)
    assert all(block.images.dtype == torch.uint8 and block.images.device.type == "cpu" for block in blocks)
    assert [label for block in blocks for label in block.labels] == [k % 4 for block in blocks for k in block.rows]
    assert sampler.evaluations == 3 * asked.description["evaluations"] > 0
    assert sampler.guided_rows == (4 + 4 + 2) * asked.description["guided_evaluations"]
    assert (asked.description["guided_evaluations"] < asked.description["evaluations"]) == (interval is not None)


def test_closing_early_ends_what_runs(source: Path) -> None:
    """No thread is left, and numbers are asked for only as they are needed."""
    asked_for: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(BLOCKS):
            asked_for.append(number)
            yield number

    before, sampler = threading.active_count(), SampleSet(job(source), NUM).sampler()
    with closing(sampler.blocks(numbers())) as blocks:  # type: ignore[type-var]
        assert next(blocks).rows == range(4)
    assert threading.active_count() == before and len(asked_for) == torch.get_num_threads() + 1
    assert sampler.evaluations == 5
