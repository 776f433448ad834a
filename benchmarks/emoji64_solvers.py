"""Solvers on the bundled model: how near to the data, and how near to the exact solution, at how many evaluations.

    python benchmarks/emoji64_solvers.py run --state FOLDER [--num 1000] [--exact 50] [--dtype bf16] [--arms A …]
    python benchmarks/emoji64_solvers.py table --state FOLDER [--figure F.png] [--markdown F.md]

`run` samples every arm (a solver on a grid with so many evaluations at most) with the same labels and seeds, half
precision weights and fp32 solver state, and keeps its images in FOLDER; started again, and on several processes with
--arms, it goes on with the arms that are not there. `table` makes of them:

FD    Fréchet distance to the training images in 64 principal components, fixed on those, of EfficientNet-Lite0's
      features (`ldit.eval.extractors.lite0`; this is no FID), with a 95 % bootstrap interval; labels are drawn as
      often as the
      training images have them. An arm's features are kept beside its images.
diff  FD minus that of 250 ancestral steps, both of the same resampled images (paired), with its 95 % interval.
RMS   root mean square distance, in pixel values of [-1, 1], of the first images to those of 1,000 steps of ab4 with
      the same seeds, all in fp32: the error of a deterministic solver. Stochastic solvers aim elsewhere and have none.

Guidance is that of the model's own sampling section for all arms. The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji64_quality import real_images
from torch import Tensor

import ldit
from ldit.codecs.pixels import to_uint8
from ldit.commands.plot import Curve, Panel
from ldit.commands.plot import draw as curves_of
from ldit.eval.extractors.extractor import LITE0, open_extractor
from ldit.eval.metrics.components import bootstrap, interval, principal_components
from ldit.eval.metrics.frechet import frechet_distance
from ldit.eval.metrics.moments import Moments
from ldit.figure import figure_bytes
from ldit.pipeline.generate import Done, Sample

MODEL = "emoji64-class-xs"
COMPONENTS = 64
RESAMPLED = 1000
BATCH = 50
REFERENCE = "ddpm-250"
NAMED = "karras"  # the grid that the figure shows beside the uniform one
ABOUT, EXACT = "about.json", "exact.npz"
STOCHASTIC = ("ddpm", "dpm++2m-sde", "euler-maruyama")
EXTRA = {"heun": lambda n: (n + 1) // 2}  # steps of n evaluations
SOLVERS = ("unipc2", "dpm++2m", "ab2", "ab3", "ab4", "heun", "ddim", "dpm++2m-sde", "euler-maruyama")


@dataclass(frozen=True)
class Arm:
    """A solver with so many evaluations at most, on a grid."""

    solver: str
    evaluations: int
    grid: str = "uniform"

    @property
    def name(self) -> str:
        return f"{self.solver}-{self.evaluations}" + ("" if self.grid == "uniform" else f"-{self.grid}")

    @property
    def deterministic(self) -> bool:
        return self.solver not in STOCHASTIC

    @property
    def steps(self) -> int:
        return EXTRA.get(self.solver, lambda n: n)(self.evaluations)


def arms() -> list[Arm]:
    """The most wanted first."""
    found = [Arm("ddpm", 250), Arm("ddpm", 50)]
    for evaluations in (20, 10, 5):
        found += [Arm(solver, evaluations) for solver in SOLVERS]
    for grid in ("cosine", "karras", "shifted:2", "shifted:0.5"):
        found += [Arm("unipc2", evaluations, grid) for evaluations in (20, 10)]
    more = ("unipc3", "dpm++3m", "dpm++2m", "ab2", "ab3", "ab4")
    return found + [Arm(solver, evaluations, "karras") for solver in more for evaluations in (20, 10)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Sample what is not there yet."""
    args.state.mkdir(parents=True, exist_ok=True)
    about = {"num": args.num, "exact": args.exact, "model": MODEL, "dtype": args.dtype, "torch": torch.__version__}
    known = args.state / ABOUT
    if known.exists() and json.loads(known.read_text()) != about:
        sys.exit(f"{known} is that of another run: choose a new --state")
    known.write_text(json.dumps(about))
    _, labels = real_images()[0]
    wanted = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).repeat(3)][: args.num]
    pipe, precise = ldit.load(MODEL, dtype=args.dtype), ldit.load(MODEL, dtype="fp32")
    if not (args.state / EXACT).exists():
        keep(args.state / EXACT, pictures=sample(precise, Arm("ab4", 1000), wanted[: args.exact])[0])
    for arm in arms():
        path = args.state / f"{arm.name}.npz"
        if path.exists() or (args.arms and arm.name not in args.arms):
            continue
        began = time.perf_counter()
        pictures, done = sample(pipe, arm, wanted)
        seconds = time.perf_counter() - began
        first, _ = sample(precise, arm, wanted[: args.exact]) if arm.deterministic else (pictures[:0], None)
        counts = np.array([done.evaluations, done.guided_rows])
        seen = to_uint8(torch.from_numpy(pictures)).numpy()
        keep(path, pictures=seen, first=first, counts=counts, seconds=np.array(seconds))
        print(f"{arm.name}: {seconds:.0f} s", flush=True)
    return {"arms": sum((args.state / f"{arm.name}.npz").exists() for arm in arms())}


def sample(pipe: Any, arm: Arm, labels: Tensor) -> tuple[np.ndarray, Done]:
    """Images (N, 3, 64, 64) in [-1, 1]; the k-th has seed k."""
    events = pipe.iterate(labels.tolist(), solver=arm.solver, steps=arm.steps, grid=arm.grid, batch_size=BATCH)
    pictures: list[Tensor] = []
    for event in events:
        if isinstance(event, Sample) and event.tensor is not None:
            pictures.append(event.tensor)
        elif isinstance(event, Done):
            return torch.stack(pictures).numpy(), event
    raise AssertionError("no end")


def features(extractor: Any, images: Tensor, path: Path) -> Tensor:
    """uint8 (N, 3, 64, 64) -> (N, 1280), kept at `path`."""
    if not path.exists():
        found = torch.cat([extractor(part).pool for part in images.split(BATCH)])
        keep(path, features=found.numpy())
    return torch.from_numpy(np.load(path)["features"])


def keep(path: Path, **arrays: np.ndarray) -> None:
    """Under its name only when it is whole."""
    beside = path.with_suffix(".tmp.npz")
    np.savez(beside, **arrays)  # type: ignore[arg-type]
    beside.rename(path)


def table(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of all arms that are there."""
    about = json.loads((args.state / ABOUT).read_text())
    extractor = open_extractor(LITE0, None, torch.device("cpu"))
    training = Moments(extractor.width)
    training.add(features(extractor, real_images()[0][0], args.state / "training.features.npz"))
    axes = principal_components(training.mean, training.covariance, COMPONENTS)
    target = axes.project_moments(training.mean, training.covariance)
    exact = np.load(args.state / EXACT)["pictures"]
    found = {arm: np.load(args.state / f"{arm.name}.npz") for arm in arms() if exists(args.state, arm)}
    distances: dict[str, float] = {}
    resampled: dict[str, np.ndarray] = {}
    for arm, data in found.items():
        kept = args.state / f"{arm.name}.features.npz"
        x = axes.project(features(extractor, torch.from_numpy(data["pictures"]), kept))
        distances[arm.name] = frechet_distance(x.mean(0), torch.from_numpy(np.cov(x.numpy().T)), *target)
        # The same seed draws the same images of every arm, so differences are of pairs.
        resampled[arm.name] = np.array(bootstrap(x, target, args.resampled))
    rows = []
    for arm, data in found.items():
        rms = float(np.sqrt(np.mean((data["first"] - exact) ** 2))) if arm.deterministic else None
        row: dict[str, Any] = {
            "arm": arm.name, "solver": arm.solver, "grid": arm.grid, "steps": arm.steps,
            "evaluations": int(data["counts"][0]) // -(-about["num"] // BATCH),
            "guided_rows_per_picture": float(data["counts"][1] / about["num"]),
            "fd": distances[arm.name], "fd_interval": interval(distances[arm.name], resampled[arm.name].tolist()),
            "rms": rms, "seconds": float(data["seconds"]),
        }  # fmt: skip
        if REFERENCE in distances:
            row["difference"] = distances[arm.name] - distances[REFERENCE]
            pairs = (resampled[arm.name] - resampled[REFERENCE]).tolist()
            row["difference_interval"] = interval(row["difference"], pairs)
        rows.append(row)
    if args.markdown:
        args.markdown.write_text(markdown(rows), encoding="utf-8")
    if args.figure:
        draw(rows, args.figure)
    facts = {"extractor": extractor.name, "extractor_sha256": extractor.fingerprint, "resize": extractor.resize}
    return {**about, **facts, "components": COMPONENTS, "resampled": args.resampled, "rows": rows}


def exists(state: Path, arm: Arm) -> bool:
    return (state / f"{arm.name}.npz").exists()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for the docs."""
    lines = [
        "| solver | grid | steps | evaluations | FD | 95 % | FD - FD of 250 ancestral steps, 95 % | RMS to exact |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        low, high = r["fd_interval"]
        a, b = r.get("difference_interval", (float("nan"),) * 2)
        difference = "–" if r["arm"] == REFERENCE else f"{r.get('difference', float('nan')):+.2f} [{a:+.2f}, {b:+.2f}]"
        rms = "–" if r["rms"] is None else f"{r['rms']:.4f}"
        fd = f"{r['fd']:.2f} | {low:.2f} – {high:.2f}"
        cells = (r["solver"], r["grid"], r["steps"], r["evaluations"], fd, difference, rms)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """FD and RMS over evaluations up to 20, a line a solver; 250 ancestral steps as a level."""
    lines: dict[str, list[dict[str, Any]]] = {name: [r for r in rows if is_line(r, name)] for name in SOLVERS}
    lines[f"unipc2, {NAMED} grid"] = [r for r in rows if (r["solver"], r["grid"]) == ("unipc2", NAMED)]
    level = [r["fd"] for r in rows if r["arm"] == REFERENCE]
    names = [name for name, points in lines.items() if points] + (["ddpm, 250 evaluations"] if level else [])
    panels = []
    for key, caption in (("fd", "FD"), ("rms", "RMS distance to the exact solution")):
        curves = []
        for place, name in enumerate(names):
            points = [(float(r["evaluations"]), r[key]) for r in lines.get(name, ()) if r[key] is not None]
            if name not in lines and key == "fd":
                points = [(5.0, level[0]), (20.0, level[0])]
            if points:
                x, y = (np.array(values, dtype=np.float64) for values in zip(*sorted(points), strict=True))
                curves.append(Curve(place, x, y, y))
        panels.append(Panel(caption, tuple(curves)))
    path.write_bytes(figure_bytes(curves_of(panels, names, "evaluations", log_y=True), path.suffix[1:]))


def is_line(row: dict[str, Any], solver: str) -> bool:
    return (row["solver"], row["grid"]) == (solver, "uniform")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    one = tasks.add_parser("run")
    one.add_argument("--num", type=int, default=1000)
    one.add_argument("--exact", type=int, default=50)
    one.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16", help="of the weights")
    one.add_argument("--arms", nargs="*")
    one.set_defaults(work=run)
    two = tasks.add_parser("table")
    two.add_argument("--figure", type=Path)
    two.add_argument("--markdown", type=Path)
    two.add_argument("--resampled", type=int, default=RESAMPLED)
    two.set_defaults(work=table)
    for task in (one, two):
        task.add_argument("--state", type=Path, required=True, help="folder of the arms' images")
        task.add_argument("--json", type=Path)
        task.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = args.work(args) | {
        "benchmark": "emoji64-solvers",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    text = json.dumps(report)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
