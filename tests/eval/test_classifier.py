"""A classifier as an extractor: whose weights, which features, images of other sizes, and what is none."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from classifiers import NAMES, SIDE, classifier_run, make_stripes
from folders import make_folder
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ldit.commands.train import run as train
from ldit.errors import EvaluationError
from ldit.eval.extractors.classifier import ClassifierExtractor, open_classifier
from ldit.eval.extractors.extractor import open_extractor
from ldit.nn.classifier import ClassifierNetwork

CPU = torch.device("cpu")
LAST = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("classifier")
    assert train(classifier_run(make_stripes(base / "data")), base / "run") == 0
    return base / "run"


def images(side: int, count: int = 5) -> Tensor:
    """Of noise, which shows every error of a filter."""
    random = np.random.RandomState(side)
    return torch.from_numpy(random.randint(0, 256, (count, 3, side, side)).astype(np.uint8))


def test_features_are_those_of_the_average(run: Path) -> None:
    """The network of the run's EMA weights on the images as training has them; the fingerprint is their file's."""
    extractor = open_classifier(run, CPU)
    assert isinstance(extractor, ClassifierExtractor) and extractor.classes == NAMES
    assert (extractor.name, extractor.metric, extractor.width) == ("classifier", "fd_classifier", 16)
    assert extractor.resize == "32x32, bilinear with antialiasing"
    file = run / LAST / "ema.safetensors"
    assert extractor.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()
    network = ClassifierNetwork(classifier_run(run).model, 3)
    network.load_state_dict(load_file(file))
    shown = images(SIDE)
    found = extractor(shown)
    with torch.no_grad():
        x = shown.float() / 127.5 - 1
        torch.testing.assert_close(found.pool, network.features(x), rtol=1e-5, atol=1e-6)
        assert found.logits is not None and found.spatial is None
        torch.testing.assert_close(found.logits, network(x, None), rtol=1e-5, atol=1e-6)
    assert found.pool.dtype == torch.float32 and found.pool.shape == (5, 16) and found.logits.shape == (5, 3)


def test_a_step_and_a_name_open_the_same(run: Path) -> None:
    one, other = open_classifier(run / LAST, CPU), open_extractor(str(run), None, CPU)
    assert one.fingerprint == other.fingerprint
    assert open_classifier(run / "checkpoints/step-00000002", CPU).fingerprint != one.fingerprint


@pytest.mark.parametrize("side", [20, 33, 96])
def test_images_of_other_sizes_are_resized_as_pillow_does(run: Path, side: int) -> None:
    """Pillow's bilinear filter is antialiased too; it rounds each axis to whole numbers, which is some 0.3 of pixels
    that are 20 or more from their mean."""
    extractor, shown = open_classifier(run, CPU), images(side)
    small = [
        np.asarray(Image.fromarray(one).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
        for one in shown.permute(0, 2, 3, 1).numpy()
    ]
    expected = extractor(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)).pool
    found = extractor(shown).pool
    # 0.4 % was measured at most; without antialiasing 0.8 and 13 % at the two larger sizes.
    assert (found - expected).abs().max() < 0.006 * expected.abs().max()


def test_a_side_that_fits_alone_is_not_enough(run: Path) -> None:
    """Wide and high images are squared as a whole: rows that repeat pixels are those pixels."""
    extractor, shown = open_classifier(run, CPU), images(SIDE)
    for axis in (2, 3):
        twice = shown.repeat_interleave(2, axis)
        # A filter two wide about the middle of two equal pixels takes an eighth of either neighbour.
        assert extractor(twice).pool.shape == (5, 16)
        assert not torch.equal(extractor(twice).pool, extractor(twice[:, :, :SIDE, :SIDE]).pool)
        square = torch.nn.functional.interpolate(twice.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        found, expected = extractor(twice).pool, extractor(square.round().to(torch.uint8)).pool
        assert (found - expected).abs().max() < 0.006 * expected.abs().max()


@pytest.mark.parametrize("shown", [torch.zeros(1, 3, 40, 40), torch.zeros(3, 40, 40, dtype=torch.uint8)])
def test_other_tensors_are_refused(run: Path, shown: Tensor) -> None:
    with pytest.raises(EvaluationError, match=r"^a classifier takes uint8 images \(B, 3, H, W\), got torch"):
        open_classifier(run, CPU)(shown)


def test_a_name_in_the_home_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    assert open_extractor("~/run", None, CPU).fingerprint == open_classifier(run, CPU).fingerprint


def test_a_image_does_not_depend_on_its_batch(run: Path) -> None:
    extractor, shown = open_classifier(run, CPU), images(SIDE)
    alone = torch.cat([extractor(one[None]).pool for one in shown])
    torch.testing.assert_close(extractor(shown).pool, alone, rtol=1e-5, atol=1e-6)


def test_what_is_no_classifier_is_said_in_one_line(run: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pictures", side=SIDE)
    for source in (folder, tmp_path / "nothing", folder / "a/0.png"):
        with pytest.raises(EvaluationError, match="is not a classifier's run or a step of one") as error:
            open_classifier(source, CPU)
        assert str(source) in str(error.value) and "\n" not in str(error.value)


def test_damage_is_said_in_one_line(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    step = copy / LAST
    text = (step / "config.json").read_text()
    (step / "config.json").write_text(text.replace('"across"', '"acros"'))
    with pytest.raises(EvaluationError, match=r"step-00000004.config\.json"):
        open_classifier(step, CPU)
    assert open_classifier(copy, CPU).fingerprint == open_classifier(run / "checkpoints/step-00000002", CPU).fingerprint
    (step / "config.json").write_text(text[:40])
    with pytest.raises(EvaluationError, match=r"config\.json"):
        open_classifier(step, CPU)
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(EvaluationError, match="has no committed step that is sound"):
        open_classifier(copy, CPU)
