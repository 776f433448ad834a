"""Computes all metrics from the features of samples and a reference, by their names in the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.collect import Collected
from ldit.eval.metrics.components import Cloud, bootstrap, cloud, interval, principal_components
from ldit.eval.metrics.frechet import frechet_distance
from ldit.eval.metrics.kernel import kernel_distance
from ldit.eval.metrics.neighbours import NEIGHBOURS, precision_recall

METRICS = ("fd", "sfid", "is", "pr", "kid")
NEED_ROWS = ("pr", "kid")
INCEPTIONS = ("sfid", "is")
LEAST = {"fd": 2, "sfid": 2, "pr": NEIGHBOURS + 1, "kid": 2}
"""The least number of images on either side."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with. `count` is None for statistics that do not state it; `rows` (M, D) are None
    unless the features of each image are known."""

    mean: Tensor
    covariance: Tensor
    count: int | None
    spatial: tuple[Tensor, Tensor] | None
    rows: Tensor | None


@dataclass(frozen=True)
class MetricPlan:
    """What to compute: names of METRICS; the number of principal components for another Fréchet distance, 0 = none;
    bootstrap samples for its 95 % interval, 0 = none; whether clouds of points will be drawn."""

    metrics: tuple[str, ...]
    components: int = 0
    resamples: int = 0
    clouds: bool = False

    @property
    def rows(self) -> bool:
        """Whether the samples' features must be kept."""
        return self.reference_rows or self.resamples > 0

    @property
    def reference(self) -> bool:
        """Whether the reference is needed: the Inception Score is of samples alone."""
        return self.metrics != ("is",) or self.components > 0 or self.clouds

    @property
    def reference_rows(self) -> bool:
        """Whether the reference's features must be kept. The bootstrap needs those of samples only."""
        return any(name in self.metrics for name in NEED_ROWS) or self.clouds


def reference_of(collected: Collected) -> Reference:
    """A collected set as a reference."""
    spatial = None if collected.spatial is None else (collected.spatial.mean, collected.spatial.covariance)
    return Reference(collected.pool.mean, collected.pool.covariance, collected.count, spatial, collected.rows)


def available(requested: Sequence[str], metric: str, spatial: bool, rows: bool) -> tuple[tuple[str, ...], list[str]]:
    """The metrics that can be computed of those requested (default: all that the extractor allows), and a line for each
    that cannot. `metric` is the extractor's; `spatial` and `rows`: whether the reference has those."""
    lacks = {
        "sfid": "" if metric == "fid" and spatial else "needs Inception and a reference with its spatial statistics",
        "is": "" if metric == "fid" else "needs Inception",
        "pr": "" if rows else "needs the images of the reference, not only statistics",
        "kid": "" if rows else "needs the images of the reference, not only statistics",
    }
    for name in requested:
        if name not in METRICS:
            raise EvaluationError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    offered = tuple(name for name in METRICS if metric == "fid" or name not in INCEPTIONS)
    chosen = tuple(dict.fromkeys(requested)) or offered
    return tuple(name for name in chosen if not lacks.get(name)), [f"{n} {lacks[n]}" for n in chosen if lacks.get(n)]


def check_reference(reference: Reference, plan: MetricPlan, name: str) -> None:
    """EvaluationError for a reference for which the metrics cannot be computed, before samples are made. `name` is a
    word for it in messages."""
    try:
        _check_reference(reference, plan)
    except EvaluationError as error:
        raise EvaluationError(f"{name}: {error}") from None


def _check_reference(reference: Reference, plan: MetricPlan) -> None:
    needed = max(plan.components, 2 if plan.clouds else 0)
    if needed:
        principal_components(reference.mean, reference.covariance, needed)
    if reference.rows is None and "fd" in plan.metrics:
        frechet_distance(reference.mean, reference.covariance, reference.mean, reference.covariance)
    if reference.rows is None and "sfid" in plan.metrics and reference.spatial is not None:
        frechet_distance(*reference.spatial, *reference.spatial)


def compute_metrics(
    samples: Collected, reference: Reference, plan: MetricPlan, metric: str, device: torch.device
) -> dict[str, Any]:
    """The metrics by name; called on the main process, which has the rows. Metrics of rows are computed on `device`.

    EvaluationError for too few images.
    """
    # From moments.
    metrics: dict[str, Any] = {}
    pool = samples.pool
    if "fd" in plan.metrics:
        metrics[metric] = frechet_distance(pool.mean, pool.covariance, reference.mean, reference.covariance)
    if "sfid" in plan.metrics and samples.spatial is not None and reference.spatial is not None:
        metrics["sfid"] = frechet_distance(samples.spatial.mean, samples.spatial.covariance, *reference.spatial)
    if "is" in plan.metrics and samples.scores is not None:
        score = samples.scores.value()
        metrics |= {"inception_score": score.mean, "inception_score_deviation": score.deviation}
        metrics["inception_score_splits"] = score.splits
    # From rows.
    rows = None if samples.rows is None else samples.rows.to(device)
    references = None if reference.rows is None else reference.rows.to(device)
    if "pr" in plan.metrics and rows is not None and references is not None:
        both = precision_recall(rows, references)
        metrics |= {"precision": both.precision, "recall": both.recall, "reached": both.reached.cpu()}
    if "kid" in plan.metrics and rows is not None and references is not None:
        kid = kernel_distance(rows, references)
        metrics |= {"kid": kid.mean, "kid_deviation": kid.deviation, "kid_subset": kid.subset_size}
    # In principal components of the reference.
    if plan.components:
        metrics |= _in_components(samples, reference, plan, metric)
    return metrics


def _in_components(samples: Collected, reference: Reference, plan: MetricPlan, metric: str) -> dict[str, Any]:
    """The Fréchet distance in principal components, and its interval."""
    axes = principal_components(reference.mean, reference.covariance, plan.components)
    target = axes.project_moments(reference.mean, reference.covariance)
    mine = axes.project_moments(samples.pool.mean, samples.pool.covariance)
    name = f"{metric}_{plan.components}"
    metrics: dict[str, Any] = {name: frechet_distance(*mine, *target)}
    if plan.resamples and samples.rows is not None:
        metrics[f"{name}_interval"] = interval(
            metrics[name], bootstrap(axes.project(samples.rows), target, plan.resamples)
        )
    return metrics


def clouds(samples: Collected, reference: Reference) -> tuple[Cloud, Cloud]:
    """Samples and reference in the reference's first two principal components; called on the main process."""
    axes = principal_components(reference.mean, reference.covariance, 2)
    mine = cloud(axes, samples.pool.mean, samples.pool.covariance, samples.rows)
    return mine, cloud(axes, reference.mean, reference.covariance, reference.rows)


def by_class(
    samples: Collected,
    labels: Sequence[int],
    names: Sequence[str],
    reached: Tensor | None,
    classes: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each class: its number of images; its precision, if `reached` (N,) tells which samples count; and its
    accuracy, if the extractor's `classes` are the same as `names`."""
    truth = torch.tensor(labels)
    predicted = (
        samples.predicted if samples.predicted is not None and tuple(classes) == tuple(names) and names else None
    )
    rows = []
    for label in sorted(set(labels)):
        mine = truth == label
        row: dict[str, Any] = {
            "class": names[label] if label < len(names) else f"class {label}",
            "pictures": int(mine.sum()),
        }
        if reached is not None:
            row["precision"] = float(reached[mine].double().mean())
        if predicted is not None:
            row["accuracy"] = float((predicted[mine] == label).double().mean())
        rows.append(row)
    return rows
