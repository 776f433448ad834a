"""int8 products on the CPU (fbgemm, oneDNN): weights by output channel, activations by token as they come."""

import warnings

import torch
from torch import Tensor, nn

from ldit.errors import RequestError

_LEAST = 1e-12  # a token of zeros


class Int8Linear(nn.Module):
    """x·Wᵀ with W rounded to 8 bits, each row to its own largest value, and every token of x to its own.

    torch's kernel rounds all of x to one range, which would make an image depend on its batch. So tokens are divided
    by their largest value before, and multiplied after; a token more, of 1 and -1, pins the range.
    """

    packed: torch.ScriptObject
    reduce_range: bool

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or linear.bias is not None:
            raise RequestError(f"int8: needs an fp32 network on the CPU, got {weight.dtype} on {weight.device}")
        scale = weight.abs().amax(1).clamp_(min=_LEAST) / 127
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        zero = torch.zeros(len(scale), dtype=torch.long)
        with (
            warnings.catch_warnings()
        ):  # torch means to drop its quantised dtypes some day; it has nothing else as fast
            warnings.simplefilter("ignore", UserWarning)
            whole = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0)
            self.packed = torch.ops.quantized.linear_prepack(whole, None)
        # Without VNNI pairs of products are summed in 16 bits, which 8-bit activations would overflow.
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N), fp32."""
        tokens = x.reshape(-1, x.shape[-1])
        count = len(tokens)
        largest = torch.linalg.vector_norm(tokens, float("inf"), dim=-1, keepdim=True).clamp_(min=_LEAST)
        even = torch.empty(count + 1, x.shape[-1])
        torch.div(tokens, largest, out=even[:count])
        even[count].zero_()
        even[count, :2] = torch.tensor((1.0, -1.0))
        out = torch.ops.quantized.linear_dynamic(even, self.packed, self.reduce_range)
        return out[:count].mul_(largest).view(*x.shape[:-1], -1)
