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
import os
import platform
import shutil
import sys
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
from ldit.nn.build import parameter_count
from ldit.storage import manifest
from ldit.storage.atomic import write_json
from ldit.storage.signals import Stopped

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
TUNING_SEED = 100
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
    if arm.rates_of:
        return tuned_rate(ARMS[arm.rates_of], task, points)
    if len(arm.rates) == 1:
        return arm.rates[0]
    jobs = [Job(task, arm, "tune", rate, TUNING_SEED) for rate in arm.rates]
    rows = [points.get(job.key(job.steps)) for job in jobs]
    found = [row for row in rows if row is not None]
    return min(found, key=lambda row: row["fd_lite0"])["rate"] if len(found) == len(jobs) else None


def next_job(task: Task, arms: list[str]) -> Job | None:
    """The first run that is not complete: by groups, and in those one seed of every arm before the next seed."""
    points = read_points(task)
    for group in ORDER:
        for seed, name in product(SEEDS, (name for name in group if name in arms)):
            arm = ARMS[name]
            source = ARMS[arm.rates_of] if arm.rates_of else arm
            tuning = [Job(task, source, "tune", rate, TUNING_SEED) for rate in source.rates if len(source.rates) > 1]
            rate = tuned_rate(arm, task, points)
            full = [] if rate is None else [Job(task, arm, "full", rate, seed)]
            for job in (*tuning, *full):
                if any(job.key(step) not in points for step in job.points):
                    return job
    return None


def append(task: Task, row: dict[str, Any]) -> None:
    """Add a line, in one write that is on the disk before it returns."""
    with open(results_file(task), "ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")
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
    """Train the run, then measure the points that are missing. Checkpoints go when all are measured."""
    from ladder_measure import sampled

    out, config = args.work / job.name, job.config(args.data)
    ldit.train(experiment(job.arm, config), out)
    steps = dict(committed_steps(out))
    known, heldout = read_points(job.task), heldout_errors(out)
    for step in job.points:
        if job.key(step) in known:
            continue
        assert step in steps, f"{out}: step {step} was not kept"
        images, seconds = sampled(job.arm, config, step_folder(out, step), job.task)
        seen = step * job.task.batch
        row = {
            "arm": job.arm.name, "phase": job.phase, "rate": job.rate, "seed": job.seed, "steps": job.steps,
            "step": step, "images": seen, "tflop": training_flops(job.arm, config) * seen / 1e12,
            **judge.of_images(images), "heldout": heldout.get(step), "sampling_seconds": round(seconds, 1),
            "ema": config.ema.decay, "precision": config.train.precision, **about(judge.fingerprints()),
        }  # fmt: skip
        append(job.task, row)
        print(f"  {step}: FD {row['fd_lite0']:.2f} (Lite0), {row['fd_classifier']:.2f} (classifier)", flush=True)
    shutil.rmtree(out)


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
    found: dict[str, dict[str, float]] = {}
    for name in args.arms:
        arm, row = ARMS[name], {}
        for precision, compiled in (("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)):
            variant = f"{precision}-compiled" if compiled else precision
            config = configured(arm, task, "x", arm.rates[0], 0, task.steps)
            train = replace(config.train, precision=precision)  # type: ignore[arg-type]
            config = replace(config, train=train, parallel=replace(config.parallel, compile=compiled))
            row[variant] = round(speed_of(arm, config, args.rounds), 1)
            ceiling = ceilings[precision]
            share = row[variant] * training_flops(arm, config) / ceiling if ceiling else 0
            print(
                f"{name:16s} {variant:14s} {row[variant]:7.1f} images/s, {share:.0%} of the matrix ceiling", flush=True
            )
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


def speed_of(arm: Arm, config: RunConfig, rounds: int) -> float:
    """Images/s of training steps, the median of rounds; over stages the mean by their share of the steps."""
    from ldit.bench.ceiling import timed
    from ldit.bench.train_step import started
    from ldit.training.step import train_step

    seconds = 0.0  # of an average image
    sizes = [(stage.steps, replace(config, stages=(stage,))) for stage in config.stages]
    rest = config.train.steps - sum(steps for steps, _ in sizes)
    for steps, part in [*sizes, (rest, replace(config, stages=()))]:
        state, work, batch = started(part, CPU, experiment(arm, part).network)

        def run(count: int, parts: Any = (state, work, batch)) -> None:
            for _ in range(count):
                train_step(*parts)

        run(3)
        times = [timed(lambda: run(10), CPU) for _ in range(rounds)]
        seconds += steps / config.train.steps * median(times) / (10 * config.train.batch_size)
    return 1 / seconds


def plan(args: argparse.Namespace, task: Task) -> None:
    """The arms in order, with parameters, FLOPs, and hours by the measured rate."""
    file = rates_file(task)
    measured = json.loads(file.read_text())["images_per_second"] if file else {}
    total = 0.0
    print(f"{'arm':16s} {'params':>8s} {'MFLOP/image':>12s} {'images/s':>9s} {'hours':>6s}  what")
    for name in args.arms:
        arm = ARMS[name]
        config = configured(arm, task, "x", arm.rates[0], 0, task.steps)
        speed = measured.get(name, {}).get(VARIANT)
        tuning = len(arm.rates) if len(arm.rates) > 1 and not arm.rates_of else 0
        images = task.batch * (tuning * task.tuning_steps + len(SEEDS) * task.steps)
        points = tuning + len(SEEDS) * len(task.points)
        hours = None if speed is None else (images / speed + points * PER_EVALUATION) / 3600
        total += hours or 0.0
        shown = "?" if speed is None else f"{speed:.0f}", "?" if hours is None else f"{hours:.1f}"
        parameters = parameters_of(arm, config) / 1e6
        flops = training_flops(arm, config) / 1e6
        print(f"{name:16s} {parameters:7.2f}M {flops:12.0f} {shown[0]:>9s} {shown[1]:>6s}  {arm.what}")
    print(f"in all {total:.1f} hours; rates tried: " + ", ".join(f"{n} {ARMS[n].rates}" for n in args.arms))


def parameters_of(arm: Arm, config: RunConfig) -> int:
    with torch.device("meta"):
        network = experiment(arm, config).network
        return sum(p.numel() for p in network(config.model).parameters()) if network else parameter_count(config.model)


# --- table ------------------------------------------------------------------------------------------------------------


def needed(curve: list[tuple[float, float]], target: float) -> float | None:
    """Images at which a falling curve of (images, distance) first reaches `target`, by log-linear interpolation between
    its points; None where it does not."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= target:
            if before is None:
                return x
            share = (before[1] - target) / (before[1] - y)
            return float(before[0] * (x / before[0]) ** share)
        before = (x, y)
    return None


def curves(task: Task, name: str, measure: str) -> dict[int, list[tuple[float, float]]]:
    """Seed -> (images, measure) of the complete runs of an arm."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in read_points(task).values():
        if row["arm"] == name and row["phase"] == "full":
            found.setdefault(row["seed"], []).append((row["images"], row[measure]))
    return {seed: sorted(points) for seed, points in sorted(found.items()) if len(points) == len(task.points)}


def table(args: argparse.Namespace, task: Task) -> None:
    """The ladder, in Markdown: the final distances, and the images an arm needs for the final distance of the published
    recipe, as a share of what that took."""
    file, lines = rates_file(task), []
    speeds = json.loads(file.read_text())["images_per_second"] if file else {}
    reference = curves(task, "published", "fd_lite0")
    lines.append("| arm | rate | seeds | FD Lite0 | FD classifier | neighbours | held-out | images | FLOPs | seconds |")
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    base = configured(ARMS["published"], task, "x", 1e-4, 0, task.steps)
    for name in args.arms:
        arm, own = ARMS[name], curves(task, name, "fd_lite0")
        if not own:
            continue
        last = [row for row in read_points(task).values()
                if row["arm"] == name and row["phase"] == "full" and row["step"] == task.steps]  # fmt: skip
        config = configured(arm, task, "x", last[0]["rate"], 0, task.steps)
        ratios = []
        for seed, points in own.items():
            if seed in reference:
                final, reached = reference[seed][-1], needed(points, reference[seed][-1][1])
                ratios.append(final[0] / reached if reached else float("nan"))
        cost = training_flops(arm, config) / training_flops(ARMS["published"], base)
        pace = None
        if name in speeds and "published" in speeds:
            pace = speeds["published"][VARIANT] / speeds[name][VARIANT]
        cells = [
            f"{name}", f"{last[0]['rate']:g}", str(len(own)),
            *(spread_of([row[key] for row in last], digits)
              for key, digits in (("fd_lite0", 1), ("fd_classifier", 2), ("neighbours", 2), ("heldout", 4))),
            spread_of(ratios, 1, "x"), spread_of([r / cost for r in ratios], 1, "x"),
            spread_of([r / pace for r in ratios], 1, "x") if pace else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Rates tried at a third of the budget (FD Lite0 there):", ""]
    for name in args.arms:
        rows = [row for row in read_points(task).values() if row["arm"] == name and row["phase"] == "tune"]
        tried = ", ".join(f"{row['rate']:g}: {row['fd_lite0']:.1f}" for row in sorted(rows, key=lambda r: r["rate"]))
        lines.append(f"- {name}: {tried or 'as published' if len(ARMS[name].rates) == 1 else tried}")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


def spread_of(values: list[float], digits: int, unit: str = "") -> str:
    """Mean and standard deviation over seeds; "-" where a seed has none."""
    if not values or any(value is None or value != value for value in values):
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}{unit}"


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
