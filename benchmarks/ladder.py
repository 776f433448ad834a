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
import platform
import shutil
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ladder_arms import ARMS, ORDER, TASKS, Arm, Task, configured, training_flops
from ladder_points import RESULTS, SEEDS, Job, append, next_job, read_points
from ladder_table import VARIANT, draw, rates_file, table_of, training_seconds

import ldit
from ldit.checkpoint.run import committed_steps, step_folder
from ldit.config.recipes.registry import recipe
from ldit.config.run import RunConfig
from ldit.errors import LditError, RunError
from ldit.figure import check_plotting
from ldit.nn.build import parameter_count
from ldit.storage import manifest
from ldit.storage.atomic import write_json
from ldit.storage.signals import Stopped

CPU = torch.device("cpu")
PER_EVALUATION = 45.0  # seconds of sampling and features of a point, for the plan


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
        ldit.train(config, out)
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
        images, seconds = sampled(step_folder(out, step), job.task, SAMPLER)
        row = row_of(job, config, step) | judge.of_images(images)
        row |= {"heldout": heldout.get(step), "sampling_seconds": round(seconds, 1), **about(judge.fingerprints())}
        if job.arm.sampling:  # measured with guidance of its own besides
            guided, _ = sampled(step_folder(out, step), job.task, {**SAMPLER, **job.arm.sampling})
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
        "images": seen, "tflop": training_flops(config, seen) / 1e12, "ema": config.ema.decay,
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
            row[variant] = parts = speeds_of(config, args.rounds)
            ceiling = ceilings[precision]
            flops = training_flops(config, config.train.batch_size)
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


def speeds_of(config: RunConfig, rounds: int) -> list[float]:
    """Images/s of training steps in each stage and at the full size, the median of rounds."""
    from ldit.bench.ceiling import timed
    from ldit.bench.train_step import started
    from ldit.training.step import train_step

    found = []
    for part in (*(replace(config, stages=(stage,)) for stage in config.stages), replace(config, stages=())):
        state, work, batch = started(part, CPU)

        def run(count: int, parts: Any = (state, work, batch)) -> None:
            for _ in range(count):
                train_step(*parts)

        run(3)
        times = [timed(lambda: run(10), CPU) for _ in range(rounds)]
        found.append(round(10 * config.train.batch_size / median(times), 1))
    return found


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
        parameters = parameter_count(config.model) / 1e6
        flops = training_flops(config, whole) / whole / 1e6
        print(f"{name:16s} {parameters:7.2f}M {flops:12.0f} {shown[0]:>9s} {shown[1]:>6s}  {arm.what}")
    print(f"in all {total:.1f} hours; rates tried: " + ", ".join(f"{n} {ARMS[n].rates}" for n in args.arms))


def table(args: argparse.Namespace, task: Task) -> None:
    """The ladder, in Markdown: final distances, and how much less an arm needs for the final distance of another."""
    if args.figure:
        check_plotting(args.figure, "--figure")
    text = table_of(args.arms, task)
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.figure:
        draw(args.arms, task, args.figure)


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
        one.add_argument("--figure", type=Path)
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
    except LditError as error:
        print(f"ladder.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
