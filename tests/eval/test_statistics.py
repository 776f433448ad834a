"""Statistics files: guided-diffusion's and ours are read, ours are written, everything else is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldit.errors import EvaluationError
from ldit.eval import reference as statistics
from ldit.eval.reference import (
    Statistics,
    has_statistics,
    read_statistics,
    write_statistics,
)
from ldit.storage.npz import open_images

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)


def covariance(width: int) -> np.ndarray:
    factors = RNG.standard_normal((width, 2 * width))
    return factors @ factors.T


MOMENTS: dict[str, Any] = {"mu": RNG.standard_normal(4).astype("f4"), "sigma": covariance(4)}
SPATIAL: dict[str, Any] = {"mu_s": RNG.standard_normal(3).astype("f4"), "sigma_s": covariance(3)}
ABOUT = {"format": 1, "count": 9, "extractor": "classifier", "fingerprint": "ab", "resize": "none"}


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def about(**changes: Any) -> np.ndarray:
    said = {key: value for key, value in {**ABOUT, **changes}.items() if value is not None}
    return np.frombuffer(json.dumps(said).encode(), np.uint8)


def refused(path: Path, pattern: str) -> None:
    with pytest.raises(EvaluationError, match=pattern) as caught:
        read_statistics(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_reference_batch_of_guided_diffusion(tmp_path: Path) -> None:
    """mu in float32, sigma in float64, images beside them."""
    path = save(tmp_path / "x.npz", arr_0=IMAGES, **MOMENTS, **SPATIAL)
    found = read_statistics(path)
    for value, key in ((found.mean, "mu"), (found.covariance, "sigma"),
                       (found.spatial_mean, "mu_s"), (found.spatial_covariance, "sigma_s")):  # fmt: skip
        assert value is not None and value.dtype == torch.float64
        assert np.array_equal(value.numpy(), {**MOMENTS, **SPATIAL}[key].astype("f8"))
    assert (found.count, found.extractor, found.fingerprint, found.resize) == (None, "inception", "", "")
    assert found.images is not None and len(found.images) == 5 and found.images.shape == (4, 4, 3)
    assert np.array_equal(np.concatenate(list(found.images.batches(2))), IMAGES)


def test_moments_alone(tmp_path: Path) -> None:
    """As pytorch-fid writes them; what else a file holds does not matter."""
    found = read_statistics(save(tmp_path / "x.npz", other=np.array(["a"]), **MOMENTS))
    assert found.spatial_mean is found.spatial_covariance is found.images is None


def test_what_holds_mu_is_statistics(tmp_path: Path) -> None:
    assert has_statistics(save(tmp_path / "x.npz", arr_0=IMAGES, **MOMENTS))
    assert not has_statistics(save(tmp_path / "y.npz", arr_0=IMAGES))
    assert np.array_equal(next(open_images(tmp_path / "y.npz").batches(9)), IMAGES)
    with pytest.raises(EvaluationError, match=r"has no arr_0, images: it holds mu, sigma"):
        open_images(save(tmp_path / "x.npz", **MOMENTS))


@pytest.mark.parametrize("spatial", [False, True])
def test_ours_come_back(tmp_path: Path, spatial: bool) -> None:
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    given = Statistics(
        12, torch.from_numpy(MOMENTS["mu"]).double(), torch.from_numpy(MOMENTS["sigma"]),
        *((torch.from_numpy(SPATIAL["mu_s"]).double(), torch.from_numpy(SPATIAL["sigma_s"])) if spatial else ()),
        extractor="efficientnet-lite0", fingerprint="0123", resize="224x224, bilinear é", size=(48, 64),
    )  # fmt: skip
    write_statistics(first, given)
    found = read_statistics(first)
    for name in ("count", "extractor", "fingerprint", "resize", "size"):
        assert getattr(found, name) == getattr(given, name)
    for name in ("mean", "covariance", "spatial_mean", "spatial_covariance"):
        value, expected = getattr(found, name), getattr(given, name)
        assert value is None if expected is None else torch.equal(value, expected)
    assert found.images is None
    write_statistics(second, found)
    assert first.read_bytes() == second.read_bytes()
    with np.load(first, allow_pickle=False) as plain:
        keys = ["mu", "sigma", *(["mu_s", "sigma_s"] if spatial else []), "about"]
        assert list(plain) == keys


@pytest.mark.parametrize(("changes", "pattern"), [
    ({"mu": None}, r"has no mu, statistics: it holds sigma$"),
    ({"sigma": None}, r"has no sigma, statistics: it holds mu$"),
    ({"mu_s": SPATIAL["mu_s"]}, "has mu_s without sigma_s"),
    ({"sigma_s": SPATIAL["sigma_s"]}, "has sigma_s without mu_s"),
    ({"mu": np.zeros(5)}, r"sigma has the shape \(4, 4\), but mu has \(5,\)"),
    ({"mu": np.zeros((4, 1))}, r"mu has the shape \(4, 1\); expected 1 axes"),
    ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has the shape \(0,\)"),
    ({"sigma": np.zeros((4, 5))}, r"sigma has the shape \(4, 5\), but mu has"),
    ({"sigma": np.zeros(16)}, r"sigma has the shape \(16,\); expected 2 axes"),
    ({"mu": np.zeros(4, "i8")}, "mu is int64; statistics are float32 or float64"),
    ({"mu": np.zeros(4, "f2")}, "mu is float16"),
    ({"mu": np.zeros(4, "c16")}, "mu is complex128"),
    ({"sigma": np.zeros((4, 4), bool)}, "sigma is bool"),
    ({"sigma": np.zeros((4, 4), object)}, "sigma holds Python objects"),
    ({"mu": np.array([0, np.nan, 0, 0])}, "mu is not finite"),
    ({"sigma": np.full((4, 4), np.inf)}, "sigma is not finite"),
    ({"sigma": -np.eye(4)}, "sigma is not a covariance: a variance in it is negative"),
    ({"sigma": np.eye(4) + np.eye(4, k=1) * 1e-3}, "sigma is not a covariance: it is not symmetric"),
    ({"mu_s": SPATIAL["mu_s"] * np.nan, "sigma_s": SPATIAL["sigma_s"]}, "mu_s is not finite"),
    ({"mu_s": SPATIAL["mu_s"], "sigma_s": np.eye(4)}, r"sigma_s has the shape \(4, 4\), but mu_s has"),
    ({"arr_0": IMAGES[..., 0]}, r"arr_0 is uint8 \(5, 4, 4\)"),
    ({"about": np.zeros(3)}, r"about is float64 \(3,\)"),
    ({"about": np.zeros(1 << 17, np.uint8)}, r"about is uint8"),
    ({"about": np.frombuffer(b"{", np.uint8)}, "about is not JSON"),
    ({"about": np.frombuffer(b"[" * 9999, np.uint8)}, "about is not JSON"),
    ({"about": np.frombuffer(b"[1]", np.uint8)}, "about is not a JSON object"),
    ({"about": about(format=2)}, "about has format 2; this version reads 1"),
    ({"about": about(count=None)}, "about has count None; expected int"),
    ({"about": about(count=True)}, "about has count True; expected int"),
    ({"about": about(count=1)}, "about has count 1; a covariance needs at least 2"),
    ({"about": about(size=[8])}, r"about has size \[8\]; expected height and width"),
    ({"about": about(size=[8, -8])}, r"about has size \[8, -8\]; expected height and width"),
    ({"about": about(extractor=7)}, "about has extractor 7; expected str"),
])  # fmt: skip
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(save(tmp_path / "x.npz", **{**MOMENTS, **changes}), pattern)


def test_a_covariance_in_single_precision_is_symmetric_enough(tmp_path: Path) -> None:
    sigma = MOMENTS["sigma"].astype("f4")
    sigma[0, 1] = np.nextafter(sigma[0, 1], np.float32(9e9))
    found = read_statistics(save(tmp_path / "x.npz", mu=MOMENTS["mu"], sigma=sigma, about=about(surplus=1)))
    assert (found.count, found.extractor) == (9, "classifier") and found.covariance.dtype == torch.float64


def test_features_that_are_too_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "WIDEST", 3)
    refused(save(tmp_path / "x.npz", **MOMENTS), r"mu has the shape \(4,\); expected 1 axes of 1 to 3")


def test_a_file_cut_short(tmp_path: Path) -> None:
    whole = save(tmp_path / "x.npz", **MOMENTS).read_bytes()
    for length in range(0, len(whole), 41):
        (tmp_path / "x.npz").write_bytes(whole[:length])
        refused(tmp_path / "x.npz", "damaged")


def test_what_is_not_written(tmp_path: Path) -> None:
    mean, matrix = torch.zeros(2), torch.eye(2)
    with pytest.raises(EvaluationError, match="sigma is not finite"):
        write_statistics(tmp_path / "x.npz", Statistics(3, mean, matrix * torch.nan))
    with pytest.raises(EvaluationError, match="the number of images is not known"):
        write_statistics(tmp_path / "x.npz", Statistics(None, mean, matrix))
    assert list(tmp_path.iterdir()) == []
