"""The inference copy: what the sampler calls in place of the network, with the same outputs."""

import copy
import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig
from ldit.errors import RequestError
from ldit.nn.dit import Block, DiT
from ldit.nn.kernels import attention_kernels
from ldit.nn.rope import GridScale
from ldit.nn.tables import Tables
from ldit.sampling.fast.conditioning_cache import Modulations, Pair
from ldit.sampling.fast.graphs import Graphs
from ldit.sampling.fast.options import InferenceCopy, InferenceOptions
from ldit.sampling.fast.packed import is_packable, packed_block, shell
from ldit.sampling.fast.quantised import Int8Linear

_MOST_TABLES = 32
_MOST_COMPILED = 64  # torch counts those of all blocks in the process together, and goes on without compiling beyond
_CHOOSING = threading.Lock()
"""Held while attention kernels are chosen for a call: the choice is the process's, and a call sets and resets it."""


def prepare(model: nn.Module, inference: InferenceOptions | None = None) -> "Prepared | nn.Module":
    """The network for sampling: `network(x, time, cond, *, grid=None)` as `model`. Networks other than a
    class-conditional `ldit.nn.dit.DiT` come back as they are, and so do a DiT's heirs with a forward pass of their own;
    int8, graph and host_modulation of those are a RequestError, and so is graph outside CUDA.

    No weight is held twice, but for int8 beside fp32: the model's become views of the joined ones, so it stays whole
    and follows changes in place. Moving or converting the model afterwards parts the two, see `Prepared.current`.
    """
    inference = inference or InferenceOptions()
    copied = model if isinstance(model, DiT) and _is_plain(model) else None
    check_options(copied and copied.config, inference, next(model.parameters()).device)
    if copied is None or not isinstance(copied.config, ClassModelConfig):
        return model
    return Prepared(copied, inference)


def _is_plain(model: DiT) -> bool:
    """Whether the copy computes what the network does: DiT's own forward pass, and modulations that are one product."""
    own = all(getattr(type(model), name) is getattr(DiT, name) for name in ("forward", "modulations"))
    modulated = (*model.layers, model.final_layer)
    return own and all(
        type(part.adaLN_modulation) is nn.Sequential and [type(one) for one in part.adaLN_modulation] == _MODULATION
        for part in modulated
    )


_MODULATION = [nn.SiLU, nn.Linear]


def check_options(config: Any, inference: InferenceOptions, device: torch.device) -> None:
    """RequestError for switches that do not go with each other, with a network of this configuration, or there."""
    if inference.int8 and inference.compiled:
        raise RequestError("int8: its products cannot be compiled; choose one of the two")
    for name in ("int8", "graph", "host_modulation"):
        if getattr(inference, name) and not isinstance(config, ClassModelConfig):
            raise RequestError(f"{name}: built for class-conditional Large-DiT networks alone")
    if inference.graph and device.type != "cuda":
        raise RequestError(f"graph: CUDA graphs need a GPU, got {device}")


class Prepared(InferenceCopy):
    """See `prepare`. Call `plan` before the first step of a batch; who shares it with others takes `apart` first."""

    def __init__(self, model: DiT, inference: InferenceOptions) -> None:
        weight = model.x_embedder.weight
        self.model, self.inference = model, inference
        self.device, self.dtype = weight.device, weight.dtype
        self.blocks = [_prepared(block, inference) for block in model.layers]  # type: ignore[arg-type]
        self.modulations = Modulations(model, inference.host_modulation)
        self._kernels = attention_kernels(self.device, self.dtype, model.config.head_dim)
        self._choosing = _CHOOSING if self.device.type == "cuda" else nullcontext()
        self._tables = Tables(_MOST_TABLES)
        self.graphs = Graphs() if inference.graph else None
        self._places = self._state()

    def current(self) -> bool:
        """Whether the model's weights are still those that this computes with: not after `model.to(…)` that changed
        anything, nor where blocks were rounded to int8 and the weights changed since."""
        return self._state() == self._places

    def _state(self) -> list[tuple[int, torch.dtype, int]]:
        """Where the weights that are shared lie, and of those rounded when they were last written. The modulations' own
        may move."""
        shared = (p for name, p in self.model.layers.named_parameters() if "adaLN_modulation" not in name)
        return [(p.data_ptr(), p.dtype, p._version if self.inference.int8 else 0) for p in shared]

    def apart(self) -> "Prepared":
        """The same network for one request: weights, tables and graphs are shared, `plan` and `release` are its own.

        Requests interleave, step by step in one thread or in several, and a thread that goes on with one need not be
        the one that began it. So no lock is held from one step to the next; what a request has to keep is its own.
        """
        own = copy.copy(self)
        own.modulations = Modulations(self.model, self.inference.host_modulation)
        return own

    def release(self) -> bool:
        """Let go of all graphs, which hold memory for speed alone, and go on without; whether there was any to let go
        of. Others that share them capture theirs again."""
        graphs, self.graphs = self.graphs, None
        if graphs is not None:
            graphs.forget()
        return graphs is not None

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
        rows, rope = self.modulations(time, cond), self._table(x, grid)
        with self._choosing, self._kernels():
            return self._body(x, rows, rope) if self.graphs is None else self.graphs(self._body, x, rows, rope)

    def _table(self, x: Tensor, grid: GridScale | None) -> Tensor:
        return self._tables.get((*x.shape[-2:], grid), lambda: self.model.positions(x, grid))

    def _body(self, x: Tensor, rows: Tensor, rope: Tensor) -> Tensor:
        """The network's own forward pass over the blocks of this copy: what a CUDA graph holds."""
        *blocks, final = rows.split(self.modulations.widths, dim=1)
        modulations = [block.unflatten(-1, (6, -1)) for block in blocks]
        out = self.model.compute(x, rope, self.blocks, modulations, final.unflatten(-1, (2, -1)))
        assert isinstance(out, Tensor)
        return out


def _prepared(block: Block, inference: InferenceOptions) -> Block:
    if inference.int8 and not is_packable(block):
        raise RequestError(f"int8: the attention or FFN of {type(block).__name__} is not the package's own")
    if inference.int8:
        return packed_block(block, Int8Linear)
    on_cpu = next(block.parameters()).device.type == "cpu"
    joined = not on_cpu if inference.packed is None else inference.packed
    twin = packed_block(block) if joined and is_packable(block) else shell(block)
    if inference.compiled:
        twin.forward = _compiled(twin.forward)  # type: ignore[method-assign]
    return twin


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled for the size of the first images, and for all others once another comes; each time for any number of
    rows, one row by itself. A request has many: guided and not, full batches, the last one, halves."""
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, _MOST_COMPILED)
    run = torch.compile(forward)

    def call(x: Tensor, rope: Tensor, modulation: Tensor) -> Tensor:
        if x._is_view():  # only the first block's are, which alone would want graphs of its own for that
            x = x.clone()
        for value in (x, modulation):
            torch._dynamo.maybe_mark_dynamic(value, 0)
        return run(x, rope, modulation)

    return call
