"""Solvers by name: generators over a denoiser, a start and a grid of levels, with fp32 state.

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
from ldit.sampling import multistep, single_step
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
    "dpm++2m-sde": multistep.dpm_2m_sde,
    "unipc2": multistep.unipc_2,
    "euler-maruyama": single_step.euler_maruyama,
}


def find_solver(name: str, eta: float = 0.0) -> Solver:
    """The solver of that name. `eta` 0 … 1: how much noise ddim adds. RequestError names what is wrong."""
    if name not in SOLVERS:
        raise RequestError(f"solver: expected one of {', '.join(SOLVERS)}, got {name!r}")
    if not 0.0 <= eta <= 1.0:
        raise RequestError(f"eta: must be 0 to 1, got {eta:g}")
    if eta and name != "ddim":
        raise RequestError(f"eta {eta:g}: only solver 'ddim' takes it, got {name!r}")
    return partial(single_step.ddim, eta=eta) if eta else SOLVERS[name]
