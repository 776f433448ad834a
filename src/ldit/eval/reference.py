"""The reference of an evaluation: a file of statistics (moments of features, perhaps with images), or a set of images.

Statistics files have the keys of guided-diffusion's reference batches: mu (D,) and sigma (D, D), mu_s and sigma_s for
Inception's spatial features, arr_0 for images. Those of ldit add `about`: JSON with the extractor and the count.
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
WIDEST = 8192  # features: a covariance of half a gigabyte
ABOUT = "about"
_MEAN, _COVARIANCE, _SPATIAL_MEAN, _SPATIAL_COVARIANCE = "mu", "sigma", "mu_s", "sigma_s"
_LONGEST = 1 << 16  # bytes of `about`
_SYMMETRY = 1e-5  # relative to the largest entry: covariances may be stored in single precision


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of a set's features, float64 on the CPU, and perhaps its images.

    If the file does not state them, `count` is None and `fingerprint` and `resize` are empty: files of guided-diffusion
    and pytorch-fid have, by convention, Inception's features of complete training sets. `size` is None in files that do
    not state it.
    """

    count: int | None
    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    extractor: str = "inception"
    fingerprint: str = ""
    resize: str = ""
    size: tuple[int, int] | None = None
    """(H, W) of the images whose features these are, as they went into the extractor."""
    images: Images | None = None
    name: str = ""
    """The name of the file."""
    crc32: str = ""
    """The CRC-32 of mu and sigma in the file's directory, which identifies the file's content."""


def has_statistics(path: Path) -> bool:
    """Whether an .npz file holds statistics (the key mu), besides anything else. EvaluationError when it cannot be
    read."""
    return _MEAN in members(path)


def open_reference(
    reference: str,
    extractor: Extractor,
    size: tuple[int, int],
    side: int | None,
    block: int,
    name: str = "reference",
    heldout: str | None = None,
) -> Statistics | ImageStream:
    """Statistics that fit the extractor, or images, cropped to `side` or the samples' `size`. EvaluationError for
    anything else; `name` is a word for it in messages. `heldout` as in `open_stream`."""
    path = Path(reference).expanduser()
    check_there(reference, name)
    if path.suffix == ".npz" and has_statistics(path):
        statistics = read_statistics(path)
        _check_fits(statistics, extractor, path)
        return statistics
    if not is_images(reference):
        raise EvaluationError(f"{name} {reference}: expected an .npz, a folder of images, or a bundled set")
    return open_stream(reference, None, side or min(size), block, heldout)


def _check_fits(statistics: Statistics, extractor: Extractor, path: Path) -> None:
    """EvaluationError for statistics of features that are not the extractor's."""
    if statistics.extractor != extractor.name:
        raise EvaluationError(f"{path}: statistics of {statistics.extractor}, the extractor is {extractor.name}")
    if statistics.fingerprint not in ("", extractor.fingerprint):
        raise EvaluationError(f"{path}: statistics of {extractor.name} with other weights than these")
    if statistics.resize not in ("", extractor.resize):
        advice = " (--protocol)" if extractor.metric == "fid" else ""
        resized = f"{statistics.resize}, not {extractor.resize}{advice}"
        raise EvaluationError(f"{path}: statistics of images resized by {resized}")
    if len(statistics.mean) != extractor.width:
        raise EvaluationError(f"{path}: {len(statistics.mean)} features, {extractor.name} has {extractor.width}")
    spatial = 0 if statistics.spatial_mean is None else len(statistics.spatial_mean)
    if spatial not in (0, extractor.spatial):
        raise EvaluationError(f"{path}: {spatial} spatial features, {extractor.name} has {extractor.spatial}")


def read_statistics(path: Path) -> Statistics:
    """The statistics in an .npz file of ldit or guided-diffusion; of its images, only the header is read.

    EvaluationError names the file and the key that is missing, not finite, of a wrong shape or dtype, or not a
    covariance.
    """
    # Which keys there are.
    arrays = members(path)
    for key in (_MEAN, _COVARIANCE):
        if key not in arrays:
            raise EvaluationError(f"{path} has no {key}, statistics: it holds {', '.join(arrays) or 'nothing'}")
    for key, other in ((_SPATIAL_MEAN, _SPATIAL_COVARIANCE), (_SPATIAL_COVARIANCE, _SPATIAL_MEAN)):
        if key in arrays and other not in arrays:
            raise EvaluationError(f"{path} has {key} without {other}")
    # Read and check them.
    about = _read_about(arrays[ABOUT]) if ABOUT in arrays else {}
    images = Images(arrays[IMAGES]) if IMAGES in arrays else None
    if images is not None:
        about.setdefault("size", images.shape[:2])
    spatial: tuple[Tensor | None, Tensor | None] = (None, None)
    if _SPATIAL_MEAN in arrays:
        spatial = _moments(arrays[_SPATIAL_MEAN], arrays[_SPATIAL_COVARIANCE])
    return Statistics(
        about.pop("count", None),
        *_moments(arrays[_MEAN], arrays[_COVARIANCE]),
        *spatial,
        **about,
        images=images,
        name=path.name,
        crc32=" ".join(f"{arrays[key].info.CRC:08x}" for key in (_MEAN, _COVARIANCE)),
    )


def _moments(mean: Member, covariance: Member) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D), float64, checked."""
    for member, axes in ((mean, 1), (covariance, 2)):
        if member.dtype.kind != "f" or member.dtype.itemsize not in (4, 8):
            raise member.refuse(f"is {member.dtype}; statistics are float32 or float64")
        if len(member.shape) != axes or not all(1 <= side <= WIDEST for side in member.shape):
            raise member.refuse(f"has the shape {member.shape}; expected {axes} axes of 1 to {WIDEST}")
    if covariance.shape != mean.shape * 2:
        raise covariance.refuse(f"has the shape {covariance.shape}, but {mean.key} has {mean.shape}")
    moments = tuple(torch.from_numpy(read_array(m).astype(np.float64)) for m in (mean, covariance))
    for member, value in zip((mean, covariance), moments, strict=True):
        if not torch.isfinite(value).all():
            raise member.refuse("is not finite")
    fault = _fault(moments[1])
    if fault:
        raise covariance.refuse(fault)
    return moments[0], moments[1]


def _fault(covariance: Tensor) -> str:
    """Why a matrix cannot be a covariance, judged by its entries; "" if it may be one."""
    if (covariance.diagonal() < 0.0).any():
        return "is not a covariance: a variance in it is negative"
    if (covariance - covariance.T).abs().max() > _SYMMETRY * covariance.abs().max():
        return "is not a covariance: it is not symmetric"
    return ""


def _read_about(member: Member) -> dict[str, Any]:
    """The content of `about`, with the types of its values checked."""
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
        raise member.refuse(f"has format {about.get('format')!r}; this version reads {FORMAT}")
    for key, kind in kinds.items():
        if type(about.get(key)) is not kind:
            raise member.refuse(f"has {key} {about.get(key)!r}; expected {kind.__name__}")
    size = about.get("size")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
            raise member.refuse(f"has size {size!r}; expected height and width")
        about["size"] = tuple(size)
    if about["count"] < 2:
        raise member.refuse(f"has count {about['count']}; a covariance needs at least 2")
    return {key: about[key] for key in kinds if key != "format"} | {"size": about.get("size")}


def write_statistics(path: Path, statistics: Statistics, images: np.ndarray | None = None) -> None:
    """Write an .npz file that `read_statistics` and guided-diffusion's evaluator can read, the latter only with
    `images`, uint8 (N, H, W, 3). It is written atomically, and the same statistics give the same bytes. EvaluationError
    when it cannot be written or the statistics are not finite."""
    arrays = {_MEAN: statistics.mean, _COVARIANCE: statistics.covariance}
    if statistics.spatial_mean is not None and statistics.spatial_covariance is not None:
        arrays |= {_SPATIAL_MEAN: statistics.spatial_mean, _SPATIAL_COVARIANCE: statistics.spatial_covariance}
    for key, value in arrays.items():
        if not torch.isfinite(value).all():
            raise EvaluationError(f"{path} is not written: {key} is not finite")
    if statistics.count is None:
        raise EvaluationError(f"{path} is not written: the number of images is not known")
    about = {
        "format": FORMAT,
        "count": statistics.count,
        "extractor": statistics.extractor,
        "fingerprint": statistics.fingerprint,
        "resize": statistics.resize,
        "size": statistics.size,
    }
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    numbers = {key: value.detach().cpu().to(torch.float64).numpy() for key, value in arrays.items()}
    kept = {} if images is None else {IMAGES: images}
    write_npz(path, {**kept, **numbers, ABOUT: text})
