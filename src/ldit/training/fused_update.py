"""AdamW, the main average and the network's low-precision copy in one pass over memory, as a Triton kernel.

Each number of the state is read and written once: 36 bytes a parameter with bf16 gradients and fp32 moments, where
separate passes move 60. One launch serves all parameters: the kernel finds their addresses in a table. The arithmetic
is that of `adamw` and `ema`, and so are the random bits of `moments`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldit.training.adamw import EPS, Row
from ldit.training.ema import MAIN, Averages
from ldit.training.moments import BLOCK, CODES, seed_of
from ldit.training.optim import Optimizer
from ldit.training.tasks.inputs import to_device
from ldit.training.update import Update
from ldit.training.update_kernel import update
from ldit.training.weights import Weights

TILE = 2048  # numbers of one program: 16 blocks of the 8-bit codes
WARPS = 8
ALIGNED = 16  # bytes that are read at once where addresses and sizes allow it
_PARAM, _FIRST, _SECOND, _SCALE, _AVERAGE, _COPY, _SIZE, _COLUMNS = range(8)
_KINDS = {"none": 0, "fp32": 1, "bf16": 2, "int8": 3}
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class _Launch:
    """What one launch works on: the parameters of one kind of moments. `places`: theirs among the masters."""

    kind: str
    places: list[int]
    indices: list[int]
    """In `AdamW.rows`, for the seeds."""
    table: Tensor
    shares: Tensor
    owner: Tensor
    tile: Tensor
    aligned: bool


class FusedUpdate(Update):
    """One pass for AdamW, the average named "ema" and the copy; Muon's matrices are moved before."""

    def __init__(self, weights: Weights, averages: Averages, optimizer: Optimizer) -> None:
        super().__init__(weights, averages, optimizer)
        self._averages = [] if averages.on_host or MAIN not in averages.tracks else averages.main
        self._copies = weights.copies
        groups: dict[tuple[str, bool], list[tuple[int, int, Row | None]]] = {}
        rows = {row.name: (index, row) for index, row in enumerate(optimizer.adamw.rows)}
        for place, (name, master) in enumerate(zip(weights.names, weights.masters, strict=True)):
            index, row = rows.get(name, (0, None))
            # What AdamW does not train: Muon's matrices change, fixed parameters do not.
            if master.numel() and (row is not None or name in optimizer.matrices):
                kind = "none" if row is None else row.moments.kind
                groups.setdefault((kind, master.numel() % ALIGNED == 0), []).append((place, index, row))
        self._launches = [self._launch(kind, found) for (kind, _), found in groups.items()]

    def queue(
        self, grads: Sequence[Tensor], lr: float, sound: Tensor, number: int, factor: Tensor | None, n: int
    ) -> None:
        self.averages.settle()
        adamw = self.optimizer.adamw
        self.optimizer.step_muon(grads, lr, sound, number, factor)
        # What the kernel learns on the device: the verdict, the factor, both biases.
        adamw.count += sound
        one = torch.ones((), device=sound.device)
        numbers = [sound, one if factor is None else factor, *adamw.biases()]
        device = torch.stack([value.to(torch.float32) for value in numbers])
        share = self.averages.share(MAIN, n) if self._averages else 0.0
        for launch in self._launches:
            if launch.kind == "none" and not share and not self._copies:
                continue
            given = [grads[place].contiguous() for place in launch.places]
            addresses = [grad.data_ptr() for grad in given]
            seeds = [seed_of(number, index) for index in launch.indices]
            on_device = to_device(torch.tensor([addresses, seeds]), sound.device)
            update[(len(launch.owner),)](
                launch.table, on_device[0], launch.shares, on_device[1], launch.owner, launch.tile, device,
                float(lr), float(adamw.weight_decay), 1.0 - adamw.beta1, 1.0 - adamw.beta2, float(share),
                EPSILON=EPS, KIND=_KINDS[launch.kind], GRAD=_FLOATS[given[0].dtype],
                COPY=_FLOATS[self._copies[0].dtype] if self._copies else 0, AVERAGE=bool(share),
                ALIGNED=launch.aligned and all(address % ALIGNED == 0 for address in addresses),
                TILE=TILE, BLOCK=BLOCK, CODES=CODES, COLUMNS=_COLUMNS + 1, num_warps=WARPS,
            )  # fmt: skip

    def settle(self, n: int) -> None:
        self.averages.update(self.weights.masters, n, () if self.averages.on_host else (MAIN,))

    def _launch(self, kind: str, found: Sequence[tuple[int, int, Row | None]]) -> _Launch:
        """The tables of a launch, on the device."""
        device = self.weights.device
        table, owner, tile = [], [], []
        for i, (place, _, row) in enumerate(found):
            master = self.weights.masters[place]
            addresses = [0] * (_COLUMNS + 1)
            addresses[_PARAM], addresses[_SIZE] = master.data_ptr(), master.numel()
            if row is not None:
                addresses[_FIRST], addresses[_SECOND] = row.moments.first.data_ptr(), row.moments.second.data_ptr()
                addresses[_SCALE] = row.moments.scale.data_ptr() if kind == "int8" else 0
            addresses[_AVERAGE] = self._averages[place].data_ptr() if self._averages else 0
            addresses[_COPY] = self._copies[place].data_ptr() if self._copies else 0
            table.append(addresses)
            programs = -(-master.numel() // TILE)
            owner.append(torch.full((programs,), i, dtype=torch.int32))
            tile.append(torch.arange(programs, dtype=torch.int32))
        pointers = [_PARAM, _FIRST, _AVERAGE, _COPY, _SIZE, *([] if kind == "int8" else [_SECOND])]
        return _Launch(
            kind,
            [place for place, _, _ in found],
            [index for _, index, _ in found],
            torch.tensor(table, device=device),
            torch.tensor([1.0 if row is None else row.share for _, _, row in found], device=device),
            torch.cat(owner).to(device),
            torch.cat(tile).to(device),
            all(addresses[column] % ALIGNED == 0 for addresses in table for column in pointers),
        )
