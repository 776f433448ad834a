"""The inference copy: what the sampler calls in place of the network, with the same outputs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig
from ldit.errors import RequestError
from ldit.nn.dit import Block, DiT
from ldit.nn.kernels import attention_kernels
from ldit.nn.rope import GridScale
from ldit.nn.tokens import patchify, rope_table, unpatchify
from ldit.sampling.graphs import Graphs
from ldit.sampling.modulation import Modulations, Pair
from ldit.sampling.packed import packed_block, shell
from ldit.sampling.quantised import Int8Linear

_MOST_TABLES = 32


@dataclass(frozen=True)
class Switches:
    """What is done to the blocks. `packed`: q, k, v in one product and w1, w3 in one; None: on a GPU, which saves
    launches; on a CPU the strided halves cost more than the larger products gain. `int8`: the products of attention
    and FFN in 8 bits, CPU and fp32 alone. `compiled`: torch.compile, block by block. `graph`: an evaluation is a CUDA
    graph, on a GPU. `host_modulation`: the adaLN weights live on the host."""

    packed: bool | None = None
    int8: bool = False
    compiled: bool = False
    graph: bool = False
    host_modulation: bool = False


def prepare(model: nn.Module, switches: Switches | None = None) -> "Prepared | nn.Module":
    """The network for sampling: `network(x, time, cond, *, grid=None)` as `model`. Networks other than a
    class-conditional `ldit.nn.dit.DiT` come back as they are; int8 of those is a RequestError.

    No weight is held twice, but for int8 beside fp32: the model's become views of the joined ones, so it stays whole
    and follows changes in place. Moving or converting the model afterwards parts the two, see `Prepared.current`.
    """
    switches = switches or Switches()
    check_switches(model.config, switches)
    if not isinstance(model, DiT) or not isinstance(model.config, ClassModelConfig):
        return model
    return Prepared(model, switches)


def check_switches(config: Any, switches: Switches) -> None:
    """RequestError for switches that do not go with each other, or with a network of this configuration."""
    if switches.int8 and switches.compiled:
        raise RequestError("int8: its products cannot be compiled; choose one of the two")
    if switches.int8 and not isinstance(config, ClassModelConfig):
        raise RequestError("int8: built for class-conditional Large-DiT networks alone")


class Prepared:
    """See `prepare`. Call `plan` before the first step of a batch."""

    def __init__(self, model: DiT, switches: Switches) -> None:
        weight = model.x_embedder.weight
        self.model, self.switches = model, switches
        self.device, self.dtype = weight.device, weight.dtype
        self.blocks = [_prepared(block, switches) for block in model.layers]  # type: ignore[arg-type]
        self.modulations = Modulations(model, switches.host_modulation)
        self._kernels = attention_kernels(self.device, self.dtype, model.config.head_dim)
        self._tables: dict[tuple[int, int, GridScale | None], Tensor] = {}
        self._run = Graphs(self._body) if switches.graph and self.device.type == "cuda" else self._body
        self._places = self._state()

    def current(self) -> bool:
        """Whether the model's weights are still those that this computes with: not after `model.to(…)` that changed
        anything, nor where blocks were rounded to int8 and the weights changed since."""
        return self._state() == self._places

    def _state(self) -> list[tuple[int, torch.dtype, int]]:
        """Where the weights that are shared lie, and of those rounded when they were last written. The modulations' own
        may move."""
        shared = (p for name, p in self.model.layers.named_parameters() if "adaLN_modulation" not in name)
        return [(p.data_ptr(), p.dtype, p._version if self.switches.int8 else 0) for p in shared]

    @torch.no_grad()
    def plan(self, pairs: Iterable[Pair]) -> None:
        """Say which (time, label) will be asked for, in their order, so that their conditioning is made together: times
        as the network is given them, labels of a batch and the null class where it guides. What was made of other
        pairs is forgotten; of the same it stays, so plan nothing, `plan([])`, after the weights were changed in place.
        """
        self.modulations.plan(pairs)

    @torch.no_grad()
    def __call__(self, x: Tensor, time: Tensor, cond: Tensor, *, grid: GridScale | None = None) -> Tensor:
        """x (B, C, H, W) in the network's dtype, time (B,) fp32, cond (B,) labels -> (B, out_channels, H, W).

        time and cond may lie on the host whatever the device; then a call does not wait for the device.
        """
        rows = self.modulations(time, cond)
        with self._kernels():
            return self._run(x, rows, self._table(x, grid))

    def _table(self, x: Tensor, grid: GridScale | None) -> Tensor:
        config = self.model.config
        key = (x.shape[-2] // config.patch_size, x.shape[-1] // config.patch_size, grid)
        if key not in self._tables:
            if len(self._tables) >= _MOST_TABLES:
                self._tables.pop(next(iter(self._tables)))
            self._tables[key] = rope_table(config.rope, key[0], key[1], config.head_dim, self.device, grid)
        return self._tables[key]

    def _body(self, x: Tensor, rows: Tensor, rope: Tensor) -> Tensor:
        model = self.model
        tokens = model.x_embedder(patchify(x, model.config.patch_size))
        shape = tokens.shape[1:3]
        tokens = tokens.flatten(1, 2)
        *blocks, final = rows.split(self.modulations.widths, dim=1)
        for block, modulation in zip(self.blocks, blocks, strict=True):
            tokens = block(tokens, rope, modulation.unflatten(-1, (6, -1)))
        out = model.final_layer(tokens, final.unflatten(-1, (2, -1)))
        return unpatchify(out.unflatten(1, shape), model.config.patch_size)


def _prepared(block: Block, switches: Switches) -> Block:
    if switches.int8:
        return packed_block(block, Int8Linear)
    on_cpu = block.attention.wo.weight.device.type == "cpu"
    joined = not on_cpu if switches.packed is None else switches.packed
    twin = packed_block(block) if joined else shell(block)
    if switches.compiled:
        twin.forward = torch.compile(twin.forward, dynamic=False)  # type: ignore[method-assign]
    return twin
