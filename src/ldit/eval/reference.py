"""What samples are compared with: files of statistics (moments of features, perhaps images), or sets of images.

Guided-diffusion's reference batches and ours have the same keys: mu (D,), sigma (D, D), for Inception's spatial
features mu_s and sigma_s, and arr_0, images. Ours add `about`: JSON that names the extractor and the count.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.features import Extractor
from ldit.pipeline.sets.stream import ImageStream, check_there, is_images, open_stream
from ldit.storage.npz import IMAGES, Images, Member, members, read_array, write_npz

FORMAT = 1
WIDEST = 8192  # features: their covariance is half a gigabyte
ABOUT = "about"
_MEAN, _COVARIANCE, _SPATIAL_MEAN, _SPATIAL_COVARIANCE = "mu", "sigma", "mu_s", "sigma_s"
_LONGEST = 1 << 16  # bytes of `about`
_SYMMETRY = 1e-5  # of the largest entry: a covariance kept in single precision


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of a set: moments in float64 on the CPU, and perhaps images.

    `count` is None and `fingerprint` and `resize` are empty where the file does not say: guided-diffusion's and
    pytorch-fid's are Inception's by convention, and of whole training sets.
    """

    count: int | None
    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    extractor: str = "inception"
    fingerprint: str = ""
    resize: str = ""
    images: Images | None = None
    name: str = ""
    """Of the file they were read from."""
    crc32: str = ""
    """What the file's directory says of mu and sigma, which is checked as they are read: tells files apart."""


def has_statistics(path: Path) -> bool:
    """Whether an .npz file is to be used as statistics: whether it holds mu, whatever else it holds. EvaluationError
    when it cannot be read."""
    return _MEAN in members(path)


def open_reference(
    reference: str,
    extractor: Extractor,
    size: tuple[int, int],
    side: int | None,
    block: int,
    name: str = "reference",
) -> Statistics | ImageStream:
    """Saved statistics that fit the extractor, or images, cut to `side` or the samples' `size`. EvaluationError for
    anything else; `name` is what errors call it."""
    path = Path(reference).expanduser()
    check_there(reference, name)
    if path.suffix == ".npz" and has_statistics(path):
        statistics = read_statistics(path)
        _check_fits(statistics, extractor, path)
        return statistics
    if not is_images(reference):
        raise EvaluationError(f"{name} {reference}: expected an .npz, a folder of images, or a bundled set")
    return open_stream(reference, None, side or min(size), block)


def _check_fits(statistics: Statistics, extractor: Extractor, path: Path) -> None:
    """EvaluationError for statistics of other features than the extractor's."""
    if statistics.extractor != extractor.name:
        raise EvaluationError(f"{path}: statistics of {statistics.extractor}, the extractor is {extractor.name}")
    if statistics.fingerprint not in ("", extractor.fingerprint):
        raise EvaluationError(f"{path}: statistics of other weights of {extractor.name} than these")
    if statistics.resize not in ("", extractor.resize):
        raise EvaluationError(f"{path}: statistics of images resized by {statistics.resize}, not {extractor.resize}")
    if len(statistics.mean) != extractor.width:
        raise EvaluationError(f"{path}: {len(statistics.mean)} features, {extractor.name} has {extractor.width}")
    spatial = 0 if statistics.spatial_mean is None else len(statistics.spatial_mean)
    if spatial not in (0, extractor.spatial):
        raise EvaluationError(f"{path}: {spatial} spatial features, {extractor.name} has {extractor.spatial}")


def read_statistics(path: Path) -> Statistics:
    """Statistics of an .npz file, ours or guided-diffusion's. Of its images nothing is read but the shape.

    EvaluationError names the file and the key that is missing, not finite, of another shape or dtype, or no covariance.
    """
    held = members(path)
    for key in (_MEAN, _COVARIANCE):
        if key not in held:
            raise EvaluationError(f"{path} has no {key}, statistics: it holds {', '.join(held) or 'nothing'}")
    for key, other in ((_SPATIAL_MEAN, _SPATIAL_COVARIANCE), (_SPATIAL_COVARIANCE, _SPATIAL_MEAN)):
        if key in held and other not in held:
            raise EvaluationError(f"{path} has {key} without {other}")
    about = _read_about(held[ABOUT]) if ABOUT in held else {}
    spatial: tuple[Tensor | None, Tensor | None] = (None, None)
    if _SPATIAL_MEAN in held:
        spatial = _moments(held[_SPATIAL_MEAN], held[_SPATIAL_COVARIANCE])
    return Statistics(
        about.pop("count", None),
        *_moments(held[_MEAN], held[_COVARIANCE]),
        *spatial,
        **about,
        images=Images(held[IMAGES]) if IMAGES in held else None,
        name=path.name,
        crc32=" ".join(f"{held[key].info.CRC:08x}" for key in (_MEAN, _COVARIANCE)),
    )


def _moments(mean: Member, covariance: Member) -> tuple[Tensor, Tensor]:
    for member, axes in ((mean, 1), (covariance, 2)):
        if member.dtype.kind != "f" or member.dtype.itemsize not in (4, 8):
            raise member.refuse(f"is {member.dtype}; statistics are float32 or float64")
        if len(member.shape) != axes or not all(1 <= side <= WIDEST for side in member.shape):
            raise member.refuse(f"has the shape {member.shape}; expected {axes} axes of 1 to {WIDEST}")
    if covariance.shape != mean.shape * 2:
        raise covariance.refuse(f"has the shape {covariance.shape}, and {mean.key} {mean.shape}")
    moments = tuple(torch.from_numpy(read_array(m).astype(np.float64)) for m in (mean, covariance))
    for member, value in zip((mean, covariance), moments, strict=True):
        if not torch.isfinite(value).all():
            raise member.refuse("is not finite")
    fault = _fault(moments[1])
    if fault:
        raise covariance.refuse(fault)
    return moments[0], moments[1]


def _fault(covariance: Tensor) -> str:
    """Why a matrix is no covariance, as far as a look at its entries tells."""
    if (covariance.diagonal() < 0.0).any():
        return "is no covariance: a variance in it is negative"
    if (covariance - covariance.T).abs().max() > _SYMMETRY * covariance.abs().max():
        return "is no covariance: it is not symmetric"
    return ""


def _read_about(member: Member) -> dict[str, Any]:
    """What one of our files says of itself, each value of its kind."""
    if member.dtype != np.uint8 or len(member.shape) != 1 or member.bytes > _LONGEST:
        raise member.refuse(f"is {member.dtype} {member.shape}; expected at most {_LONGEST} bytes of JSON")
    try:
        about = json.loads(read_array(member).tobytes())
    except (ValueError, RecursionError):
        raise member.refuse("is not JSON") from None
    kinds = {"format": int, "count": int, "extractor": str, "fingerprint": str, "resize": str}
    if not isinstance(about, dict):
        raise member.refuse("is not a JSON object")
    if about.get("format") != FORMAT:
        raise member.refuse(f"says format {about.get('format')!r}; this version reads {FORMAT}")
    for key, kind in kinds.items():
        if type(about.get(key)) is not kind:
            raise member.refuse(f"says {key} {about.get(key)!r}; expected {kind.__name__}")
    if about["count"] < 2:
        raise member.refuse(f"says count {about['count']}; a covariance needs at least 2")
    return {key: about[key] for key in kinds if key != "format"}


def write_statistics(path: Path, statistics: Statistics) -> None:
    """An .npz file that `read_statistics`, and guided-diffusion's evaluator, read: whole under its name or not at all,
    and the same bytes for the same statistics; without images. EvaluationError when it cannot be written or the
    statistics are not finite."""
    arrays = {_MEAN: statistics.mean, _COVARIANCE: statistics.covariance}
    if statistics.spatial_mean is not None and statistics.spatial_covariance is not None:
        arrays |= {_SPATIAL_MEAN: statistics.spatial_mean, _SPATIAL_COVARIANCE: statistics.spatial_covariance}
    for key, value in arrays.items():
        if not torch.isfinite(value).all():
            raise EvaluationError(f"{path} is not written: {key} is not finite")
    if statistics.count is None:
        raise EvaluationError(f"{path} is not written: how many images its statistics are of is not known")
    about = {
        "format": FORMAT,
        "count": statistics.count,
        "extractor": statistics.extractor,
        "fingerprint": statistics.fingerprint,
        "resize": statistics.resize,
    }
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    numbers = {key: value.detach().cpu().to(torch.float64).numpy() for key, value in arrays.items()}
    write_npz(path, {**numbers, ABOUT: text})
