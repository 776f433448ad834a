"""int8 matrix products on the CPU (fbgemm, oneDNN): weights scaled by output channel, activations by token."""

import warnings

import torch
from torch import Tensor, nn

from ldit.errors import RequestError

_LEAST = 1e-12  # smallest scale: a token of zeros is not divided by 0


class Int8Linear(nn.Module):
    """x·Wᵀ in 8 bits: every row of W is scaled by its largest value, and so is every token of x.

    torch's kernel rounds all of x with one scale, so an image would depend on the others of its batch. To prevent that,
    tokens are divided by their largest value before the product and multiplied by it after. An additional token with
    1 and -1 fixes the kernel's range.
    """

    packed: torch.ScriptObject
    reduce_range: bool

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or linear.bias is not None:
            raise RequestError(f"int8: needs an fp32 network on the CPU, got {weight.dtype} on {weight.device}")
        # Round the weights, then pack them for the kernel.
        scale = weight.abs().amax(1).clamp_(min=_LEAST) / 127
        rounded = (weight / scale[:, None]).round_().to(torch.int8)
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            # torch warns that it will drop its quantised dtypes; nothing else in it is as fast.
            warnings.simplefilter("ignore", UserWarning)
            quantised = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zero, 0)
            self.packed = torch.ops.quantized.linear_prepack(quantised, None)
        # Without VNNI instructions pairs of products are summed in 16 bits, which overflow unless x has 7 bits.
        self.reduce_range = not torch.cpu._is_vnni_supported()

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, N), fp32."""
        tokens = x.reshape(-1, x.shape[-1])
        count = len(tokens)
        # Scale every token to [-1, 1], and add the token that fixes the range.
        largest = torch.linalg.vector_norm(tokens, float("inf"), dim=-1, keepdim=True).clamp_(min=_LEAST)
        scaled = torch.empty(count + 1, x.shape[-1])
        torch.div(tokens, largest, out=scaled[:count])
        scaled[count].zero_()
        scaled[count, :2] = torch.tensor((1.0, -1.0))
        # Multiply in 8 bits, then undo the scaling.
        out = torch.ops.quantized.linear_dynamic(scaled, self.packed, self.reduce_range)
        return out[:count].mul_(largest).view(*x.shape[:-1], -1)
