"""AdamW's two moments of one parameter, in fp32, in bf16, or the first in 8 bits.

bf16 keeps 8 bits of a number. At beta2 = 0.999 the second moment moves by a thousandth a step, which rounding to
nearest loses. Stochastic rounding keeps it on average: a number is rounded up with a probability equal to its place
between its two neighbours. The random bits are a hash of step, parameter and place in this rank's part, so a run that
is resumed by as many processes repeats them.

int8 is for matrices whose rows are made of whole blocks of `BLOCK` numbers. The first moment is a code of -127 … 127
times a scale for each block, rounded stochastically. The second moment is one fp32 number for each block, the mean of
its squared gradients (Adam-mini, Zhang et al. 2024, with smaller blocks). Other parameters keep fp32.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ldit.errors import ConfigError
from ldit.parallel.layout import Layout

BLOCK = 128
CODES = 127
PIECE = 1 << 16  # numbers that are worked on at once, a multiple of BLOCK
_GOLDEN, _MIX1, _MIX2, _WORD = 0x9E3779B9, 0x7FEB352D, 0x846CA68B, 0xFFFFFFFF


def seed_of(step: int, index: int) -> int:
    """The 32-bit seed of parameter `index` at a step."""
    return _hashed((_hashed(step & _WORD) + (index + 1) * _GOLDEN) & _WORD)


def _hashed(word: int) -> int:
    """A bijection of 32-bit words whose bits look random (Wellons 2018, "lowbias32")."""
    word = ((word ^ (word >> 16)) * _MIX1) & _WORD
    word = ((word ^ (word >> 15)) * _MIX2) & _WORD
    return word ^ (word >> 16)


def random_words(count: int, seed: int, device: torch.device) -> Tensor:
    """(count,) int32: the hash of `seed` + place. The arithmetic of int32 wraps, as that of 32-bit words does."""
    word = torch.arange(count, dtype=torch.int32, device=device) + _signed(seed & _WORD)
    word = (word ^ ((word >> 16) & 0xFFFF)) * _MIX1
    word = (word ^ ((word >> 15) & 0x1FFFF)) * _signed(_MIX2)
    return word ^ ((word >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def stochastic_bf16(numbers: Tensor, bits: Tensor) -> Tensor:
    """fp32 `numbers` in bf16: up or down by 16 random `bits` (int32, 0 … 65535); exact numbers stay."""
    words = (numbers.contiguous().view(torch.int32) + bits) & -65536
    return words.view(torch.float32).to(torch.bfloat16)


class Moments:
    """The moments of a parameter of `layout`, of which this rank holds a part like `part`."""

    def __init__(self, part: Tensor, layout: Layout, kind: str) -> None:
        in_blocks = kind == "int8" and len(layout.shape) == 2 and layout.shape[1] % BLOCK == 0
        self.kind = "int8" if in_blocks else "fp32" if kind == "int8" else kind
        self.layout = layout
        if self.kind == "int8":
            rows, columns = part.shape
            if columns % BLOCK:
                raise ConfigError(
                    f"optim.moments: int8 works on {BLOCK} numbers of a row; parallel.tp {layout.tp} leaves {columns}"
                )
            self._blocks = replace(layout, shape=(layout.shape[0], layout.shape[1] // BLOCK))
            first = torch.zeros_like(part, dtype=torch.int8)
            self.scale = torch.zeros(rows, columns // BLOCK, device=part.device)
            second = torch.zeros_like(self.scale)
        else:
            dtype = torch.bfloat16 if self.kind == "bf16" else torch.float32
            first, second = (torch.zeros_like(part, dtype=dtype, requires_grad=False) for _ in range(2))
        self.first, self.second = first, second

    def tensors(self) -> Iterator[tuple[str, Layout, Tensor]]:
        """(name, layout, this rank's part) of what a checkpoint holds."""
        in_blocks = self.kind == "int8"
        yield "exp_avg", self.layout, self.first
        yield "exp_avg_sq", self._blocks if in_blocks else self.layout, self.second
        if in_blocks:
            yield "exp_avg_scale", self._blocks, self.scale

    def pieces(self) -> Iterator[slice]:
        """Ranges of the part's numbers, counted from its first, of a size that stays in a processor's cache."""
        count = self.first.numel()
        return (slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE))

    def read(self, piece: slice) -> tuple[Tensor, Tensor]:
        """Both moments of a piece in fp32: (count,) each; in int8 (blocks, BLOCK) and (blocks, 1)."""
        first = self.first.view(-1)[piece].float()
        if self.kind != "int8":
            return first, self.second.view(-1)[piece].float()
        blocks = _blocks(piece)
        scale, second = (values.view(-1)[blocks, None] for values in (self.scale, self.second))
        return first.view(-1, BLOCK) * scale, second.clone()

    def write(self, piece: slice, first: Tensor, second: Tensor, seed: int, sound: Tensor) -> None:
        """Store moments of a piece, of the shapes that `read` returns, where `sound`, a bool on the device, is true."""
        put = _putter(sound)
        codes = self.first.view(-1)[piece]
        words = random_words(codes.numel(), seed + piece.start, codes.device)
        if self.kind == "bf16":
            put(codes, stochastic_bf16(first, words & 0xFFFF))
            put(self.second.view(-1)[piece], stochastic_bf16(second, (words >> 16) & 0xFFFF))
            return
        scale = first.abs().amax(-1) / CODES
        chance = (words & 0xFFFF).view_as(first) / 65536
        found = (first / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None] + chance).floor()
        put(codes, found.clamp(-CODES, CODES).to(torch.int8).view(-1))
        put(self.scale.view(-1)[_blocks(piece)], scale)
        put(self.second.view(-1)[_blocks(piece)], second[:, 0])


def _blocks(piece: slice) -> slice:
    return slice(piece.start // BLOCK, piece.stop // BLOCK)


def _putter(sound: Tensor) -> Callable[[Tensor, Tensor], None]:
    def put(old: Tensor, new: Tensor) -> None:
        torch.where(sound, new, old, out=old)

    return put
