"""`ldit ema`: reconstructs an EMA of any length from the snapshots of a run (Karras et al. 2024)."""

from ldit.config.requests.convert import EMARequest
from ldit.training.reconstruct import reconstruct


def run(request: EMARequest) -> int:
    """`ldit ema`."""
    made = reconstruct(request.run, request.out, request.sigma_rel, request.step, request.dtype)
    print(
        f"width {made.sigma_rel:g} at step {made.step} from {made.sets} averages of {made.snapshots} snapshots: "
        f"profile residual {made.residual:.1e}, coefficients' magnitudes sum to {made.magnitude:.1f}"
    )
    print(made.out)
    return 0
