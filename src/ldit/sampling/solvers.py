"""Solvers by name: plain generators over a denoiser, a start and a grid of levels. State is fp32.

| name            | order | evaluations | draws noise | source                                    |
|-----------------|-------|-------------|-------------|-------------------------------------------|
| ddpm            | weak 1| N           | yes         | Ho et al. 2020, learned-range variance    |
| ddim            | 1     | N           | eta > 0     | Song et al. 2021                          |
| euler           | 1     | N           | no          | ddim with eta 0                           |
| heun            | 2     | 2N - 1      | no          | Karras et al. 2022                        |
| ab2, ab3, ab4   | 2-4   | N, N+1, N+2 | no          | Adams-Bashforth, as SiT's best samples    |
| dpm++2m, dpm++  | 2     | N           | no          | Lu et al. 2022                            |
| dpm++2m-sde     | weak 1| N           | yes         | Lu et al. 2022                            |
| unipc2          | 3     | N           | no          | Zhao et al. 2023                          |
| euler-maruyama  | weak 1| N           | yes         | SiT's SDE, Ma et al. 2024                 |
"""

from functools import partial

from ldit.errors import RequestError
from ldit.sampling import multistep
from ldit.sampling import single_step as onestep
from ldit.sampling.step import Solver

SOLVERS: dict[str, Solver] = {
    "ddpm": onestep.ancestral,
    "ddim": onestep.ddim,
    "euler": onestep.ddim,
    "heun": onestep.heun,
    "ab2": multistep.adams_bashforth(2),
    "ab3": multistep.adams_bashforth(3),
    "ab4": multistep.adams_bashforth(4),
    "dpm++2m": multistep.dpm_2m,
    "dpm++": multistep.dpm_2m,
    "dpm++2m-sde": multistep.dpm_2m_sde,
    "unipc2": multistep.unipc_2,
    "euler-maruyama": onestep.euler_maruyama,
}


def find_solver(name: str, eta: float = 0.0) -> Solver:
    """The solver of that name, or RequestError. `eta` 0 … 1: the share of noise, of ddim alone."""
    if name not in SOLVERS:
        raise RequestError(f"unknown solver {name!r} (there are: {', '.join(SOLVERS)})")
    if not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta: must be 0 to 1, got {eta:g}")
    if eta and name != "ddim":
        raise RequestError(f"eta {eta:g}: solver {name!r} has none, ddim has")
    return partial(onestep.ddim, eta=eta) if eta else SOLVERS[name]
