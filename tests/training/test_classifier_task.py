"""Classifiers: losses by hand, fresh weights, and that how a batch is cut changes nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classifiers import NAMES, SIDE, classifier_run
from smallrun import ALONE

from ldit.config.classifier import ClassifierModelConfig, ClassifierRun, ClassifierSpec
from ldit.data.batch import Batch
from ldit.errors import ConfigError
from ldit.nn.classifier import ClassifierNetwork
from ldit.training.state import TrainState
from ldit.training.step import fill_fresh, new_state, train_step
from ldit.training.tasks.augment import augment, keep_mask
from ldit.training.tasks.classifier import ClassifierTask, class_weights

CPU = torch.device("cpu")
WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


def run(**changes: object) -> ClassifierRun:
    return classifier_run(Path("nowhere"), {key.replace("_", ".", 1): value for key, value in changes.items()})


def started(config: ClassifierRun, weights: torch.Tensor = WEIGHTS) -> tuple[TrainState, ClassifierTask]:
    task = ClassifierTask(config, ClassifierSpec(config.model, SIDE, NAMES), weights)
    state = new_state(config, task, ALONE)
    fill_fresh(state, task)
    return state, task


def batch(count: int = 8) -> Batch:
    images = torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, torch.arange(count) % 3, tuple(range(10, 10 + count)))


def nats(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> np.ndarray:
    """Cross-entropy of smoothed targets, in float64."""
    z = logits.detach().double().numpy()
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    target = np.full(z.shape, smoothing / z.shape[1])
    target[np.arange(len(z)), labels.numpy()] += 1 - smoothing
    return -(target * logp).sum(1)


def test_losses_are_those_of_the_definition() -> None:
    """Of the changed images with their own features left out, weighted by class; of held-out ones nothing of it."""
    config = run(objective_label_smoothing=0.2, objective_dropout=0.4)
    state, task = started(config)
    model, data = state.weights.model, batch()
    assert isinstance(model, ClassifierNetwork)
    with torch.no_grad():
        found = task.losses(model, data, CPU, torch.float32)
        features = model.features(augment(data.inputs, data.positions, 0))
        logits = model.head(features * keep_mask(data.positions, 0, 16, 0.4))
        expected = nats(logits, data.labels, 0.2) * WEIGHTS[data.labels].double().numpy()
        np.testing.assert_allclose(found["loss"].double().numpy(), expected, rtol=1e-5)
        assert torch.equal(found["train_accuracy"], (logits.argmax(1) == data.labels).float())
        held = task.evaluate(model, data, CPU, torch.float32)
        plain = model(data.inputs, None)
    np.testing.assert_allclose(held["cross_entropy"].double().numpy(), nats(plain, data.labels, 0.0), rtol=1e-5)
    assert torch.equal(held["accuracy"], (plain.argmax(1) == data.labels).float())


def test_switches_do_what_they_say() -> None:
    config = run(objective_augment=False, objective_dropout=0.0, objective_label_smoothing=0.0)
    state, task = started(config, torch.ones(3))
    data = batch()
    with torch.no_grad():
        found = task.losses(state.weights.model, data, CPU, torch.float32)["loss"]
        plain = F.cross_entropy(state.weights.model(data.inputs, None), data.labels, reduction="none")
    assert torch.equal(found, plain)


def test_classes_count_alike() -> None:
    counts = torch.tensor([1, 3, 0])
    weights = class_weights(counts, True)
    assert weights.tolist() == pytest.approx([2.0, 2 / 3, 0.0])
    assert (weights * counts).sum().item() / counts.sum().item() == pytest.approx(1.0)  # mean over the images
    assert class_weights(counts, False).tolist() == [1.0, 1.0, 1.0]


def test_fresh_weights_depend_on_the_name_alone() -> None:
    """Deviation sqrt(2 / inputs), and a network whose blocks are their shortcuts."""
    _, task = started(run())
    for name, p in task.network().named_parameters():
        value = task.initial(name, tuple(p.shape))
        assert torch.equal(value, task.initial(name, tuple(p.shape)))
        if value.dim() == 1:
            ones = name.endswith("weight") and "norm2" not in name
            assert (value == (1 if ones else 0)).all(), name
        else:
            expected = (2 / p[0].numel()) ** 0.5 * (0.1 if name == "head.weight" else 1)
            # The deviation of n numbers is off by 1/sqrt(2n) of itself.
            assert value.std().item() == pytest.approx(expected, rel=4 / (2 * p.numel()) ** 0.5), name


@pytest.mark.parametrize("side", [32, 45])
def test_a_fresh_block_is_its_shortcut(side: int) -> None:
    state, _ = started(run())
    model = state.weights.model
    assert isinstance(model, ClassifierNetwork)
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = F.relu(model.stem_norm(model.stem(images)))  # the first level has the same width and side
        x = F.relu(F.conv2d(F.avg_pool2d(x, 2, ceil_mode=True), model.levels[1].shortcut.weight))  # type: ignore[union-attr]
        torch.testing.assert_close(model.features(images), x.mean((2, 3)), rtol=1e-5, atol=1e-6)


def test_how_a_batch_is_cut_changes_nothing() -> None:
    """Losses and gradients of one pass, of micro-batches, and of the rows in another order; sums in another order are
    off by some 1e-7 of their size."""
    outcomes = []
    for micro, order in ((None, slice(None)), (2, slice(None)), (None, torch.arange(7, -1, -1))):
        config = run(train_micro_batch_size=micro)
        state, task = started(config)
        data = batch()
        rows = range(8)[order] if isinstance(order, slice) else order.tolist()
        cut = Batch(data.inputs[rows], data.labels[rows], tuple(data.positions[row] for row in rows))
        outcomes.append(train_step(state, task, cut).values)
    for other in outcomes[1:]:
        assert other["loss"] == pytest.approx(outcomes[0]["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(outcomes[0]["grad_norm"], rel=1e-5)


def test_training_tells_images_apart() -> None:
    """By one colour each, changed images and all."""
    state, task = started(run(), torch.ones(3))
    data = batch()
    data.inputs[torch.arange(8), data.labels] += 0.7
    losses = [train_step(state, task, data).values["loss"] for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.image_size", 31, "data.image_size: a classifier takes images of 32 to 4096 pixels, got 31"),
        ("objective.dropout", 1.0, r"objective.dropout: must be in \[0, 1\), got 1.0"),
        ("objective.label_smoothing", -0.1, "objective.label_smoothing: must be in"),
        ("train.attention_every", 5, "train.attention_every: .*got 5"),
        ("train.sample_every", 5, "train.sample_every: a classifier makes no images, got 5"),
        ("train.init_from", "x", "train.init_from: .*got 'x'"),
        ("train.init_ema", False, "train.init_ema: .*got False"),
        ("data.codec_precision", "bf16", "data.codec_precision: .*got 'bf16'"),
        ("ema.power", (0.05,), "ema.power: `ldit ema`"),
        ("optim.kind", "muon", "optim.kind: .*got 'muon'"),
        ("parallel.tp", 2, "parallel.tp: .*got 2"),
        ("parallel.recompute", "full", "parallel.recompute: .*got 'full'"),
        ("parallel.compile", True, "parallel.compile: .*got True"),
        ("data.path", "", "data.path: name the folder"),
    ],
)
def test_what_cannot_work_is_named(key: str, value: object, message: str) -> None:
    run().check()
    with pytest.raises(ConfigError, match=message):
        classifier_run(Path("nowhere"), {key: value}).check()


def test_a_norm_of_single_numbers_is_refused() -> None:
    """Eight halvings of 32 pixels leave one place; of 8 channels in 8 groups a norm would make zeros there."""
    narrow = {"model.widths": (8,) * 8, "model.norm_num_groups": 8}
    words = (
        r"^model\.widths: 8 channels in 8 groups, of 1 x 1 places each at data\.image_size 32: a group norm needs two"
    )
    with pytest.raises(ConfigError, match=words):
        classifier_run(Path("somewhere"), {**narrow, "data.image_size": 32}).check()
    for sound in ({"model.widths": (8,) * 4}, {"model.norm_num_groups": 4}, {"data.image_size": 512}):
        classifier_run(Path("somewhere"), {**narrow, "data.image_size": 32, **sound}).check()


@pytest.mark.parametrize("changes", [{"widths": ()}, {"widths": (8, 9)}, {"norm_num_groups": 0}])
def test_networks_that_cannot_be_built(changes: dict) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{next(iter(changes))}"):
        replace(ClassifierModelConfig(), **changes)
