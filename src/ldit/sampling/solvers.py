"""Solvers by name: generators over a denoiser, a start and a grid of levels, with fp32 state.

| name                     | order    | evaluations | draws noise | source                                          |
|--------------------------|----------|-------------|-------------|-------------------------------------------------|
| ddpm                     | weak 1   | N           | yes         | Ho et al. 2020, learned-range variance          |
| ddim                     | 1        | N           | eta > 0     | Song et al. 2021                                |
| euler                    | 1        | N           | no          | ddim with eta 0                                 |
| heun                     | 2        | 2N - 1      | no          | Karras et al. 2022                              |
| ab2, ab3, ab4            | 2, 3, 4  | N           | no          | Adams-Bashforth                                 |
| dpm++2m, dpm++           | 2        | N           | no          | Lu et al. 2022                                  |
| dpm++3m                  | 2, 3     | N           | no          | Lu et al. 2022                                  |
| dpm++2m-sde              | weak 1   | N           | yes         | Lu et al. 2022                                  |
| unipc2, unipc3           | 3, 4     | N           | no          | Zhao et al. 2023, B(h) of kind bh2              |
| unipc2-bh1, unipc3-bh1   | 3, 4     | N           | no          | the same of kind bh1                            |
| euler-maruyama           | weak 1   | N           | yes         | SiT's SDE, Ma et al. 2024                       |
| dopri5                   | 5        | as needed   | no          | Dormand & Prince 1980, steps by the tolerance   |

Where two orders are given for one solver, the lower one is that of its first steps. Multistep solvers lower their order
where steps grow (`ldit.sampling.multistep`), so that none is worse than Euler's method at equal evaluations
(`benchmarks/closed_form.py`).
"""

from functools import partial

from ldit.diffusion.process import Process
from ldit.errors import RequestError
from ldit.sampling import multistep, single_step
from ldit.sampling.adaptive import dopri5
from ldit.sampling.sde import euler_maruyama
from ldit.sampling.step import Solver

SOLVERS: dict[str, Solver] = {
    "ddpm": single_step.ancestral,
    "ddim": single_step.ddim,
    "euler": single_step.ddim,
    "heun": single_step.heun,
    "ab2": multistep.adams_bashforth(2),
    "ab3": multistep.adams_bashforth(3),
    "ab4": multistep.adams_bashforth(4),
    "dpm++2m": multistep.dpm_2m,
    "dpm++": multistep.dpm_2m,
    "dpm++3m": multistep.dpm_3m,
    "dpm++2m-sde": multistep.dpm_2m_sde,
    "unipc2": multistep.unipc(2),
    "unipc3": multistep.unipc(3),
    "unipc2-bh1": multistep.unipc(2, "bh1"),
    "unipc3-bh1": multistep.unipc(3, "bh1"),
    "euler-maruyama": euler_maruyama(),
}
"""Those that need only a grid, with their default settings."""
ADAPTIVE = "dopri5"
"""The solver that chooses its own steps, image by image."""
REVISIONS = dict.fromkeys(("ab2", "ab3", "ab4", "dpm++2m", "dpm++", "dpm++2m-sde", "unipc2", "euler-maruyama"), 2)
"""Solvers whose images are no longer those of earlier versions: a set that was begun with them is not continued."""
TOLERANCE = 1e-3
OWN_SETTINGS: dict[str, tuple[str, float | str]] = {
    "eta": ("ddim", 0.0),
    "diffusion": ("euler-maruyama", "sigma"),
    "last_step": ("euler-maruyama", "tweedie"),
    "tolerance": (ADAPTIVE, TOLERANCE),
}
"""Settings that one solver alone takes: which, and its default."""


def find_solver(
    name: str,
    eta: float = 0.0,
    *,
    diffusion: str = "sigma",
    last_step: str = "tweedie",
    tolerance: float = TOLERANCE,
    process: Process | None = None,
) -> Solver:
    """The solver of that name. RequestError names what is wrong.

    `eta` 0 … 1 is how much noise ddim adds. `diffusion` and `last_step` are those of euler-maruyama
    (`ldit.sampling.sde`). `tolerance` is the relative one of dopri5, which also needs the `process`.
    """
    if name not in SOLVERS and name != ADAPTIVE:
        raise RequestError(f"solver: expected one of {', '.join((*SOLVERS, ADAPTIVE))}, got {name!r}")
    # Settings that another solver would ignore.
    given = {"eta": eta, "diffusion": diffusion, "last_step": last_step, "tolerance": tolerance}
    for setting, (owner, default) in OWN_SETTINGS.items():
        value = given[setting]
        if value != default and name != owner:
            shown = value if isinstance(value, str) else f"{value:g}"
            raise RequestError(f"{setting} {shown}: only solver {owner!r} takes it, got {name!r}")
    if not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta: must be 0 to 1, got {eta:g}")
    if not 1e-6 <= tolerance <= 1.0:
        raise RequestError(f"tolerance: must be 1e-6 to 1, got {tolerance:g}")
    if name == ADAPTIVE:
        if process is None:
            raise RequestError(f"solver {ADAPTIVE}: it needs the process, to compute levels between those of a grid")
        return dopri5(process.level_of_ratio, tolerance)
    if name == "euler-maruyama":
        return euler_maruyama(diffusion, last_step)
    return partial(single_step.ddim, eta=eta) if eta else SOLVERS[name]
