"""Solvers on distributions whose denoiser and exact solution are known, and beside diffusers' schedulers.

    python benchmarks/closed_form.py table [--json F] [--markdown F]
    python benchmarks/closed_form.py peers [--json F]

`table`: every deterministic solver on every grid at 5, 10, 20 and 50 evaluations, for both processes. The distributions
are one-dimensional. There the exact solution of the probability-flow ODE keeps quantiles, so it is known without a
solver: the data's quantile of the share at which the start lies in the noisiest level's distribution. The error is the
root mean square over 2,001 evenly spread starts; a solver gets as many steps as fit into the evaluations. A ratio above
1 is worse than Euler's method at equal evaluations.

`peers`: the largest difference between our solver and diffusers' scheduler on the same levels and denoiser, as a share
of the largest value, in float64 where the scheduler allows it.

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldit
from ldit.diffusion import DDPM, Flow
from ldit.diffusion.process import CLEAN, Denoised, Level, Process
from ldit.sampling.grids import build_grid
from ldit.sampling.solvers import SOLVERS, find_solver

PROCESSES: dict[str, Process] = {"flow": Flow(), "ddpm": DDPM()}
GRIDS = ("uniform", "shifted:3", "karras", "logsnr", "cosine")
EVALUATIONS = (5, 10, 20, 50)
STARTS = 2001
ROUNDING = 1e-9
DETERMINISTIC = tuple(
    name for name in SOLVERS if name not in ("ddpm", "ddim", "dpm++", "dpm++2m-sde", "euler-maruyama")
)


@dataclass(frozen=True)
class Mixture:
    """A one-dimensional mixture of Gaussians."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    shares: tuple[float, ...]

    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(v, dtype=torch.float64)[:, None] for v in (self.means, self.stds, self.shares))

    def __call__(self, x: Tensor, level: Level) -> Denoised:
        """E[x0 | x] and the noise that goes with it: what a perfect network predicts at x (N,)."""
        means, stds, shares = self._columns()
        variance = level.alpha**2 * stds**2 + level.sigma**2
        logits = shares.log() - 0.5 * variance.log() - 0.5 * (x - level.alpha * means) ** 2 / variance
        parts = means + level.alpha * stds**2 / variance * (x - level.alpha * means)
        x0 = (logits.softmax(0) * parts).sum(0)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    def quantiles(self, shares: Tensor, level: Level) -> Tensor:
        """The places below which these shares (N,) of x at the level lie, by bisection."""
        means, stds, weights = self._columns()
        deviation = (level.alpha**2 * stds**2 + level.sigma**2).sqrt()
        low, high = torch.full_like(shares, -20.0), torch.full_like(shares, 20.0)
        for _ in range(100):
            middle = (low + high) / 2
            below = (weights * torch.special.ndtr((middle - level.alpha * means) / deviation)).sum(0) < shares
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


TARGETS = {
    "mixture": Mixture((-1.0, 0.6), (0.5, 0.4), (0.4, 0.6)),
    "sharp mixture": Mixture((-1.0, 0.2, 0.8), (0.05, 0.1, 0.02), (0.3, 0.4, 0.3)),
    "Gaussian": Mixture((0.3,), (0.5,), (1.0,)),
}


def solved(target: Mixture, solver: str, levels: Sequence[Level]) -> tuple[Tensor, int]:
    """The solver's end states from `STARTS` starts, and its number of evaluations."""
    count = 0

    def denoise(x: Tensor, level: Level) -> Denoised:
        nonlocal count
        count += 1
        return target(x, level)

    *_, step = find_solver(solver)(denoise, _at_shares(target, levels[0], STARTS), levels, _none)
    return step.x, count


def error(target: Mixture, solver: str, process: str, grid: str, evaluations: int) -> float:
    """Root mean square error of the solver with as many steps as fit into the evaluations."""
    steps = (evaluations + 1) // 2 if solver == "heun" else evaluations
    x, count = solved(target, solver, build_grid(PROCESSES[process], str(steps), grid))
    assert count <= evaluations
    return float((x - _at_shares(target, CLEAN, STARTS)).square().mean().sqrt())


def rows_of(targets: Sequence[str] = tuple(TARGETS), evaluations: Sequence[int] = EVALUATIONS) -> list[dict[str, Any]]:
    """The table: one row for each target, process, grid and solver."""
    rows = []
    for target in targets:
        for process in PROCESSES:
            for grid in GRIDS:
                euler = [error(TARGETS[target], "euler", process, grid, count) for count in evaluations]
                for solver in DETERMINISTIC:
                    errors = [error(TARGETS[target], solver, process, grid, count) for count in evaluations]
                    ratios = [one / other for one, other in zip(errors, euler, strict=True)]
                    row = {"target": target, "process": process, "grid": grid, "solver": solver}
                    rows.append(row | {"errors": errors, "ratios": ratios})
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Euler's error, and the ratio of each solver to it: a table for each target."""
    lines = []
    columns = [solver for solver in DETERMINISTIC if solver != "euler"]
    for target in TARGETS:
        lines += ["", f"### {target[0].upper()}{target[1:]}", ""]
        lines += [
            "| process | grid | evaluations | euler: error | " + " | ".join(columns) + " |",
            "|---" * (4 + len(columns)) + "|",
        ]
        for process in PROCESSES:
            for grid in GRIDS:
                here = {
                    row["solver"]: row
                    for row in rows
                    if (row["target"], row["process"], row["grid"]) == (target, process, grid)
                }
                for i, count in enumerate(EVALUATIONS):
                    cells = [_cell(here[solver]["ratios"][i]) for solver in columns]
                    euler = f"{here['euler']['errors'][i]:.4f}"
                    lines.append(f"| {process} | {grid} | {count} | {euler} | " + " | ".join(cells) + " |")
    return "\n".join(lines).lstrip() + "\n"


def _cell(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio > 1.0 + ROUNDING else f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.3f}"


@cache
def _at_shares(target: Mixture, level: Level, count: int) -> Tensor:
    """`count` quantiles of x at the level, evenly spread over the shares."""
    return target.quantiles((torch.arange(count, dtype=torch.float64) + 0.5) / count, level)


def _none(i: int) -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


# --- diffusers' schedulers -------------------------------------------------------------------------------------------

PEERS = (
    *("unipc2", "unipc3", "unipc2-bh1", "unipc3-bh1", "dpm++2m", "dpm++3m"),
    *("dpm++2m-sde", "ddim", "ddpm", "euler", "heun"),
)


def peer_difference(solver: str, steps: int = 12) -> float:
    """The largest difference to diffusers' scheduler as a share of the largest value; ImportError without diffusers."""
    target = TARGETS["mixture"]
    levels, scheduler, wanted = _peer(solver, steps)
    noise = torch.randn(len(levels), 1, STARTS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = _at_shares(target, levels[0], STARTS)[None]

    def denoise(x: Tensor, level: Level) -> Denoised:
        estimate = target(x[0], level)
        variance = torch.cos(x) if solver == "ddpm" else None  # anything in [-1, 1]
        return Denoised(estimate.x0[None], estimate.eps[None], variance)

    ours = [step.x for step in find_solver(solver)(denoise, x, levels, lambda i: noise[i])]
    # The scheduler's own loop, with what it takes for a prediction; at each call the next level.
    state, drawn = x.clone(), iter(noise)
    calls = list(levels[:-1])
    if solver == "heun":
        calls = [calls[0], *(level for level in calls[1:] for _ in range(2))]
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):  # our noise instead of its own
        vars(module)["randn_tensor"] = lambda *shape, **options: (
            next(drawn)[:, None] if solver == "ddpm" else next(drawn)
        )
    theirs = []
    for time, level in zip(scheduler.timesteps, calls, strict=True):
        d = denoise(state, level)
        out = {"x0": d.x0, "eps": d.eps, "v": d.eps - d.x0}[wanted]
        if d.variance is not None:
            out = torch.cat([out[:, None], d.variance[:, None]], 1)
            state = scheduler.step(out, time, state[:, None]).prev_sample[:, 0]
        else:
            state = scheduler.step(out, time, state).prev_sample
        theirs.append(state)
    # diffusers' bh1 gives NaN in the step to clean data (0 times an infinite step): there the one before is compared.
    last = -2 if solver.endswith("bh1") else -1
    return float((theirs[last] - ours[last]).abs().max() / ours[last].abs().max())


def _peer(solver: str, steps: int) -> tuple[Sequence[Level], Any, str]:
    """Levels for both, the scheduler that is set to them, and what it takes: x0, eps or v."""
    import diffusers as package

    diffusers: Any = package
    scheduler: Any
    levels: Sequence[Level]
    # DDIM and DDPM know only indices of the training schedule: every 1000/N-th.
    if solver in ("ddim", "ddpm"):
        count = 20
        levels = DDPM().own_grid(f"ddim{count}")
        common = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, "timestep_spacing": "leading"}
        kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[solver]
        scheduler = kind(**common, **({"variance_type": "learned_range"} if solver == "ddpm" else {}))
        scheduler.set_timesteps(count)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        return levels, scheduler, "eps"
    # Flow-matching schedulers: uniform times.
    if solver in ("euler", "heun"):
        levels = build_grid(Flow(), str(steps))
        kind = {"euler": diffusers.FlowMatchEulerDiscreteScheduler, "heun": diffusers.FlowMatchHeunDiscreteScheduler}[
            solver
        ]
        scheduler = kind()
        scheduler.set_timesteps(steps)
        sigmas = torch.tensor([level.sigma for level in levels])
        times = sigmas[:-1] * 1000
        if solver == "heun":
            sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
            times = torch.cat([times[:1], times[1:].repeat_interleave(2)])
        scheduler.sigmas, scheduler.timesteps = sigmas, times
        return levels, scheduler, "v"
    # Exponential integrators on equal steps of the log-SNR, where our bound on extrapolation has no effect.
    levels = build_grid(DDPM(), str(steps), "logsnr")
    order = 3 if "3" in solver else 2
    if solver.startswith("unipc"):
        kind = "bh1" if solver.endswith("bh1") else "bh2"
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="sample", solver_order=order, solver_type=kind)
    else:
        algorithm = "sde-dpmsolver++" if solver.endswith("sde") else "dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(
            prediction_type="sample", solver_order=order, algorithm_type=algorithm
        )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor([level.sigma / level.alpha for level in levels], dtype=torch.float64)
    scheduler.timesteps = torch.arange(steps - 1, -1, -1)
    return levels, scheduler, "x0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "peers"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": f"closed-form-{args.what}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if args.what == "table":
        rows = rows_of()
        report |= {"evaluations": EVALUATIONS, "starts": STARTS, "rows": rows}
        report["worse_than_euler"] = [
            [row["target"], row["process"], row["grid"], row["solver"], count, round(ratio, 3)]
            for row in rows for count, ratio in zip(EVALUATIONS, row["ratios"], strict=True) if ratio > 1.0 + ROUNDING
        ]  # fmt: skip
        if args.markdown:
            args.markdown.write_text(markdown(rows), encoding="utf-8")
        for worse in report["worse_than_euler"]:
            print(*worse)
    else:
        import diffusers

        report["versions"]["diffusers"] = diffusers.__version__
        report["differences"] = {solver: peer_difference(solver) for solver in PEERS}
        for solver, difference in report["differences"].items():
            print(f"{solver:15} {difference:.1e}")
    text = json.dumps(report)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
