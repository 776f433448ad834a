"""How much each change to Large-DiT's recipe is worth: the images, FLOPs and seconds that an arm needs.

    python benchmarks/ladder.py classifier --task fashion --data DIR --work DIR   # once: the second extractor
    python benchmarks/ladder.py rate --task fashion --data DIR          # images/s of every arm; on a quiet machine
    python benchmarks/ladder.py plan --task fashion                     # arms, order, cost in hours
    python benchmarks/ladder.py run --task fashion --data DIR --work DIR [--arms A …]
    python benchmarks/ladder.py table --task fashion [--markdown F] [--figure F.png]

An arm's learning rate is tuned at a third of the budget, then it is trained with three seeds at the whole budget.
`run` appends one JSON line a measured point to benchmarks/results/ladder-TASK.jsonl. Killed at any point, it goes on:
runs resume from their checkpoints, points that are in the file are not measured again. `table` makes every number from
that file. DIR of fashion: the folder of Debian's package dataset-fashion-mnist, /usr/share/datasets/fashion-mnist.
"""

import argparse
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from ladder_arms import ARMS, ORDER, TASKS, Arm, Task, configured, experiment, training_flops

import ldit
from ldit.checkpoint.run import committed_steps, step_folder
from ldit.config.recipes.registry import recipe
from ldit.config.run import RunConfig
from ldit.errors import RunError
from ldit.nn.build import parameter_count
from ldit.storage import manifest
from ldit.storage.atomic import write_json
from ldit.storage.signals import Stopped

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
LADDER_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MOST_FURTHER = 2
AGAINST = ("published", "ema")
"""Arms whose final distance is the target: the recipe as published, whose average still holds most of the initial
weights in so short a run, and the same with a warm-up of the average."""
CPU = torch.device("cpu")
VARIANT = "bf16-compiled"
"""How the ladder trains, among the variants that `rate` measures."""
PER_EVALUATION = 45.0  # seconds of sampling and features of a point, for the plan


@dataclass(frozen=True)
class Job:
    """One run: an arm at a learning rate. `phase` is "tune" (a third of the budget, measured at its end) or "full"."""

    task: Task
    arm: Arm
    phase: str
    rate: float
    seed: int

    @property
    def steps(self) -> int:
        return self.task.tuning_steps if self.phase == "tune" else self.task.steps

    @property
    def points(self) -> tuple[int, ...]:
        return (self.steps,) if self.phase == "tune" else self.task.points

    @property
    def name(self) -> str:
        return f"{self.task.name}-{self.arm.name}-{self.phase}-{self.rate:g}-{self.seed}"

    def config(self, path: str) -> RunConfig:
        return configured(self.arm, self.task, path, self.rate, self.seed, self.steps)

    def key(self, step: int) -> tuple[Any, ...]:
        return (self.arm.name, self.phase, self.rate, self.seed, self.steps, step)


def results_file(task: Task) -> Path:
    return RESULTS / f"ladder-{task.name}.jsonl"


def read_points(task: Task) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The measured points by their key; a line that was cut short by a kill is passed over."""
    points = {}
    file = results_file(task)
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        points[tuple(row[name] for name in ("arm", "phase", "rate", "seed", "steps", "step"))] = row
    return points


def tuned_rate(arm: Arm, task: Task, points: dict[tuple[Any, ...], dict[str, Any]]) -> float | None:
    """The rate with the lowest Fréchet distance in Lite0's features at the end of tuning; None until all are in."""
    if len(arm.rates) == 1:
        return arm.rates[0]
    jobs = tuning(arm, task, points)
    rows = [points.get(job.key(job.steps)) for job in jobs]
    return None if None in rows else min((row for row in rows if row), key=lambda row: row["fd_lite0"])["rate"]


def tuning(arm: Arm, task: Task, points: dict[tuple[Any, ...], dict[str, Any]]) -> list[Job]:
    """The tuning runs of an arm. While the best rate is at an end of the grid, the grid grows there, twice at most."""
    rates = list(arm.rates)
    for _ in range(MOST_FURTHER):
        jobs = [Job(task, arm, "tune", rate, TUNING_SEED) for rate in rates]
        rows = [points.get(job.key(job.steps)) for job in jobs]
        if None in rows:
            return jobs
        best = min((row for row in rows if row), key=lambda row: row["fd_lite0"])["rate"]
        if best not in (min(rates), max(rates)):
            return jobs
        place = LADDER_RATES.index(best) + (1 if best == max(rates) else -1)
        if not 0 <= place < len(LADDER_RATES):
            return jobs
        rates.append(LADDER_RATES[place])
    return [Job(task, arm, "tune", rate, TUNING_SEED) for rate in rates]


def next_job(task: Task, arms: list[str]) -> Job | None:
    """The first run that is not complete: by groups, and in those one seed of every arm before the next seed."""
    points = read_points(task)
    for group in ORDER:
        for seed, name in product(SEEDS, (name for name in group if name in arms)):
            arm = ARMS[name]
            source = ARMS[arm.rates_of] if arm.rates_of else arm
            tunes = tuning(source, task, points) if len(source.rates) > 1 else []
            rate = tuned_rate(source, task, points)
            full = [] if rate is None else [Job(task, arm, "full", rate, seed)]
            for job in (*tunes, *full):
                if any(job.key(step) not in points for step in job.points):
                    return job
    return None


def append(task: Task, row: dict[str, Any]) -> None:
    """Add a line, in one write that is on the disk before it returns."""
    path = results_file(task)
    is_cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with open(path, "ab", buffering=0) as file:
        file.write(b"\n" * is_cut + json.dumps(row).encode() + b"\n")
        os.fsync(file.fileno())


# --- run --------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, task: Task) -> None:
    from ladder_measure import Judge

    args.work.mkdir(parents=True, exist_ok=True)
    judge = Judge(task, args.data, args.classifier, args.work)
    if not any(row.get("phase") == "real" for row in read_points(task).values()):
        append(task, {"arm": "held-out images", "phase": "real", "rate": 0, "seed": 0, "steps": 0, "step": 0,
                      **judge.floor(), **about(judge.fingerprints())})  # fmt: skip
    while (job := next_job(task, args.arms)) is not None:
        print(f"{job.name}: {job.steps} steps", flush=True)
        finish(job, args, judge)


def finish(job: Job, args: argparse.Namespace, judge: Any) -> None:
    """Train the run, then measure the points that are missing. Checkpoints go when all are measured. A run that does
    not finish, because its losses are not finite, counts as infinitely far."""
    from ladder_measure import SAMPLER, sampled

    out, config = args.work / job.name, job.config(args.data)
    try:
        ldit.train(experiment(job.arm, config), out)
    except RunError as error:
        for step in job.points:
            append(job.task, row_of(job, config, step) | DIVERGED | about(judge.fingerprints()))
        print(f"  diverged: {error}", flush=True)
        shutil.rmtree(out)
        return
    steps = dict(committed_steps(out))
    known, heldout = read_points(job.task), heldout_errors(out)
    for step in job.points:
        if job.key(step) in known:
            continue
        assert step in steps, f"{out}: step {step} was not kept"
        images, seconds = sampled(job.arm, config, step_folder(out, step), job.task, SAMPLER)
        row = row_of(job, config, step) | judge.of_images(images)
        row |= {"heldout": heldout.get(step), "sampling_seconds": round(seconds, 1), **about(judge.fingerprints())}
        if job.arm.sampling:  # measured with guidance of its own besides
            guided, _ = sampled(job.arm, config, step_folder(out, step), job.task, {**SAMPLER, **job.arm.sampling})
            row |= {f"guided_{name}": value for name, value in judge.of_images(guided).items()}
        if not math.isfinite(row["fd_lite0"]):
            row |= DIVERGED
        append(job.task, row)
        print(f"  {step}: FD {row['fd_lite0']:.2f} (Lite0), {row['fd_classifier']:.2f} (classifier)", flush=True)
    shutil.rmtree(out)


DIVERGED = {"fd_lite0": 1e9, "fd_classifier": 1e9, "neighbours": None, "heldout": None, "diverged": True}


def row_of(job: Job, config: RunConfig, step: int) -> dict[str, Any]:
    """What a point is, before it is measured."""
    seen = step * job.task.batch
    return {
        "arm": job.arm.name, "phase": job.phase, "rate": job.rate, "seed": job.seed, "steps": job.steps, "step": step,
        "images": seen, "tflop": training_flops(job.arm, config, seen) / 1e12, "ema": config.ema.decay,
        "precision": config.train.precision,
    }  # fmt: skip


def heldout_errors(out: Path) -> dict[int, float]:
    """Held-out error of eps by step, of the EMA weights."""
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["step"]: row["eps_mse"] for row in lines if "eps_mse" in row}


def about(fingerprints: dict[str, str]) -> dict[str, Any]:
    versions = {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"extractors": fingerprints, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


# --- the second extractor ---------------------------------------------------------------------------------------------


def classifier(args: argparse.Namespace, task: Task) -> None:
    """Train the classifier, and keep its EMA weights."""
    if args.classifier.exists():
        raise SystemExit(f"{args.classifier} is there already")
    base = recipe("extractor-small")
    steps = 2000
    train = replace(base.train, steps=steps, checkpoint_every=steps, keep=1)
    config = replace(
        base, data=replace(base.data, path=args.data or task.path, image_size=task.side, flip=False), train=train
    )
    run = args.work / f"{task.name}-classifier"
    ldit.train(config, run)
    # What an extractor needs of a step: its configuration and EMA weights.
    step, out = step_folder(run, steps), args.classifier
    out.mkdir(parents=True)
    for name in ("config.json", "ema.safetensors"):
        shutil.copy(step / name, out / name)
    write_json(out / manifest.NAME, manifest.build(out))
    print(f"{out}: open it with `--extractor {out}`")


# --- plan and rate ----------------------------------------------------------------------------------------------------


def rates_file(task: Task) -> Path | None:
    return max(RESULTS.glob(f"*_ladder-rates-{task.name}.json"), default=None)


def rate(args: argparse.Namespace, task: Task) -> None:
    """Images/s of training steps on images in memory, every arm in turn, by precision, and with compiled blocks."""
    from ldit.bench.ceiling import matrix_ceiling

    ceilings = {name: matrix_ceiling(CPU, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    found: dict[str, dict[str, list[float]]] = {}
    for name in args.arms:
        arm: Arm = ARMS[name]
        row: dict[str, list[float]] = {}
        for precision, compiled in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
            variant = f"{precision}-compiled" if compiled else precision
            config = configured(arm, task, "x", arm.rates[0], 0, task.steps)
            train = replace(config.train, precision=precision)  # type: ignore[arg-type]
            config = replace(config, train=train, parallel=replace(config.parallel, compile=compiled))
            row[variant] = parts = speeds_of(arm, config, args.rounds)
            ceiling = ceilings[precision]
            flops = training_flops(arm, config, config.train.batch_size)
            share = parts[0] * flops / config.train.batch_size / ceiling if ceiling else 0
            print(f"{name:16s} {variant:14s} {parts} images/s, {share:.0%} of the matrix ceiling at first", flush=True)
        found[name] = row
    result = {
        "benchmark": "ladder-rates", "task": task.name, "batch": task.batch, "rounds": args.rounds,
        "ceiling_gflops": {name: round((value or 0) / 1e9, 1) for name, value in ceilings.items()},
        "images_per_second": found, **about({}),
    }  # fmt: skip
    text = json.dumps(result)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def speeds_of(arm: Arm, config: RunConfig, rounds: int) -> list[float]:
    """Images/s of training steps in each stage and at the full size, the median of rounds."""
    from ldit.bench.ceiling import timed
    from ldit.bench.train_step import started
    from ldit.training.step import train_step

    found = []
    for part in (*(replace(config, stages=(stage,)) for stage in config.stages), replace(config, stages=())):
        state, work, batch = started(part, CPU, experiment(arm, part).network)

        def run(count: int, parts: Any = (state, work, batch)) -> None:
            for _ in range(count):
                train_step(*parts)

        run(3)
        times = [timed(lambda: run(10), CPU) for _ in range(rounds)]
        found.append(round(10 * config.train.batch_size / median(times), 1))
    return found


def training_seconds(config: RunConfig, speeds: list[float], images: float) -> float:
    """Seconds of training on the first images of a run, by the speeds of its stages and of the full size."""
    total, left = 0.0, images
    for stage, speed in zip(config.stages, speeds, strict=False):
        count = min(left, stage.steps * config.train.batch_size)
        total, left = total + count / speed, left - count
    return total + left / speeds[-1]


def plan(args: argparse.Namespace, task: Task) -> None:
    """The arms in order, with parameters, FLOPs, and hours by the measured rate."""
    file = rates_file(task)
    measured = json.loads(file.read_text())["images_per_second"] if file else {}
    total = 0.0
    print(f"{'arm':16s} {'params':>8s} {'MFLOP/image':>12s} {'images/s':>9s} {'hours':>6s}  what")
    for name in args.arms:
        arm = ARMS[name]
        config = configured(arm, task, "x", arm.rates[0], 0, task.steps)
        speeds = measured.get(name, {}).get(VARIANT)
        tunes = len(arm.rates) if len(arm.rates) > 1 and not arm.rates_of else 0
        whole = task.batch * task.steps
        runs = tunes * task.tuning_steps / task.steps + len(SEEDS)
        points = tunes + len(SEEDS) * len(task.points)
        seconds = None if speeds is None else runs * training_seconds(config, speeds, whole) + points * PER_EVALUATION
        total += (seconds or 0.0) / 3600
        shown = "?" if seconds is None else f"{speeds[0]:.0f}", "?" if seconds is None else f"{seconds / 3600:.1f}"
        parameters = parameters_of(arm, config) / 1e6
        flops = training_flops(arm, config, whole) / whole / 1e6
        print(f"{name:16s} {parameters:7.2f}M {flops:12.0f} {shown[0]:>9s} {shown[1]:>6s}  {arm.what}")
    print(f"in all {total:.1f} hours; rates tried: " + ", ".join(f"{n} {ARMS[n].rates}" for n in args.arms))


def parameters_of(arm: Arm, config: RunConfig) -> int:
    with torch.device("meta"):
        network = experiment(arm, config).network
        return sum(p.numel() for p in network(config.model).parameters()) if network else parameter_count(config.model)


# --- table ------------------------------------------------------------------------------------------------------------


def needed(curve: list[tuple[float, float]], target: float) -> tuple[float, bool] | None:
    """Images at which a falling curve of (images, distance) first reaches `target`, by log-linear interpolation between
    its points; None where it does not. The flag says that it was reached before the first point, so that the number is
    only an upper bound."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= target:
            if before is None:
                return x, True
            share = (before[1] - target) / (before[1] - y)
            return float(before[0] * (x / before[0]) ** share), False
        before = (x, y)
    return None


def curves(task: Task, name: str, measure: str) -> dict[int, list[tuple[float, float]]]:
    """Seed -> (images, measure) of the complete runs of an arm."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in read_points(task).values():
        if row["arm"] == name and row["phase"] == "full":
            found.setdefault(row["seed"], []).append((row["images"], row[measure]))
    return {seed: sorted(points) for seed, points in sorted(found.items()) if len(points) == len(task.points)}


COLUMNS = (("fd_lite0", 1), ("fd_classifier", 2), ("neighbours", 2), ("heldout", 4))


def table(args: argparse.Namespace, task: Task) -> None:
    """The ladder, in Markdown: final distances, and how much less an arm needs for the final distance of another."""
    points = list(read_points(task).values())
    lines = [
        "Final distances after the whole budget; mean ± standard deviation over seeds.",
        "",
        "| arm | rate | seeds | FD Lite0 | FD classifier | neighbours | held-out |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in args.arms:
        last = [row for row in points if (row["arm"], row["phase"], row["step"]) == (name, "full", task.steps)]
        for prefix, words in (("", name), ("guided_", f"{name}, guided")):
            if last and f"{prefix}fd_lite0" in last[0]:
                cells = [spread_of([row.get(f"{prefix}{key}") for row in last], digits) for key, digits in COLUMNS]
                lines.append("| " + " | ".join([words, f"{last[0]['rate']:g}", str(len(last)), *cells]) + " |")
    for against in AGAINST:
        lines += savings(args.arms, against, task)
    lines += ["", "Rates tried at a third of the budget (FD Lite0 there):", ""]
    for name in args.arms:
        rows = sorted((row for row in points if (row["arm"], row["phase"]) == (name, "tune")), key=lambda r: r["rate"])
        if rows:
            ends = {rows[0]["rate"], rows[-1]["rate"]}
            best = min(rows, key=lambda row: row["fd_lite0"])["rate"]
            tried = ", ".join(f"{row['rate']:g}: {row['fd_lite0']:.1f}" for row in rows)
            lines.append(f"- {name}: {tried}{' (the best is at an end of the grid)' if best in ends else ''}")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


def savings(arms: list[str], against: str, task: Task) -> list[str]:
    """A table of ratios: images, FLOPs and seconds that the arm `against` took for its final distance over those that
    another arm takes to it, by seed. "≥": reached before the first point that was measured."""
    reference = curves(task, against, "fd_lite0")
    if not reference:
        return []
    file = rates_file(task)
    speeds = json.loads(file.read_text())["images_per_second"] if file else {}
    lines = ["", f"How many times less than `{against}` took for its final FD Lite0:", "",
             "| arm | images | FLOPs | seconds |", "|---|---|---|---|"]  # fmt: skip
    for name in arms:
        own, is_bound = curves(task, name, "fd_lite0"), False
        ratios: list[list[float]] = []
        for seed in sorted(own.keys() & reference.keys()):
            images, target = reference[seed][-1]
            found = needed(own[seed], target)
            if found is None:
                ratios.append([math.nan] * 3)
                continue
            is_bound |= found[1]
            ours, theirs = cost(name, task, found[0], speeds), cost(against, task, images, speeds)
            ratios.append([b / a if a and b else math.nan for a, b in zip(ours, theirs, strict=True)])
        if ratios:
            cells = [spread_of(list(column), 1, "x") for column in zip(*ratios, strict=True)]
            lines.append(f"| {name} | " + " | ".join("≥ " * (is_bound and cell != "-") + cell for cell in cells) + " |")
    return lines


def cost(name: str, task: Task, images: float, speeds: dict[str, Any]) -> tuple[float, float, float]:
    """Images, FLOPs and seconds of an arm up to a number of images; 0 seconds where its speed was not measured."""
    config = configured(ARMS[name], task, "x", ARMS[name].rates[0], 0, task.steps)
    own = speeds.get(name, {}).get(VARIANT)
    return images, training_flops(ARMS[name], config, images), training_seconds(config, own, images) if own else 0.0


def spread_of(values: Sequence[float | None], digits: int, unit: str = "") -> str:
    """Mean and standard deviation over seeds; "-" where a seed has none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation}{unit}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (classifier, rate, plan, run, table):
        one = commands.add_parser(function.__name__, help=(function.__doc__ or "").split(".")[0])
        one.set_defaults(function=function)
        one.add_argument("--task", choices=TASKS, default="fashion")
        one.add_argument("--arms", nargs="+", choices=ARMS, default=[name for group in ORDER for name in group])
        one.add_argument("--data", default="", help="folder of the images")
        one.add_argument("--classifier", type=Path, help="the second extractor's run")
        one.add_argument("--work", type=Path, help="folder of runs that are going on, and of features")
        one.add_argument("--rounds", type=int, default=5)
        one.add_argument("--json", type=Path)
        one.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    task = TASKS[args.task]
    if args.classifier is None:
        args.classifier = RESULTS / f"ladder-{task.name}-classifier"
    if args.command in ("run", "classifier") and args.work is None:
        parser.error("--work: name a folder")
    try:
        args.function(args, task)
    except Stopped as stopped:
        return stopped.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
