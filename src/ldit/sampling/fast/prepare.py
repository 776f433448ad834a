"""The inference copy of a network: same outputs, less time or memory."""

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
from ldit.nn.tables import TableCache
from ldit.sampling.fast.conditioning_cache import ModulationCache, Pair
from ldit.sampling.fast.graphs import Graphs
from ldit.sampling.fast.options import InferenceCopy, InferenceOptions
from ldit.sampling.fast.packed import is_packable, packed_block, shell
from ldit.sampling.fast.quantised import Int8Linear

_MOST_TABLES = 32
_MOST_COMPILED = 64  # torch counts compilations of all blocks together, and stops compiling beyond its limit
_CHOOSING = threading.Lock()
"""Held during a call on a GPU: attention kernels are set for the whole process, and reset after the call."""


def prepare(model: nn.Module, inference: InferenceOptions | None = None) -> "Prepared | nn.Module":
    """The inference copy of `model`, called as `network(x, time, cond, *, grid=None)`.

    Networks other than a class-conditional `ldit.nn.dit.DiT` are returned as they are, and so are subclasses with a
    forward pass of their own. RequestError for options that the network or the device does not support, see
    `check_options`.

    The copy shares its weights with the model, but for int8 ones: the model's become views of joined ones, so the model
    still works, and weights that are changed in place change in both. After the model is moved or converted the copy
    is out of date, see `Prepared.is_current`.
    """
    inference = inference or InferenceOptions()
    copied = model if isinstance(model, DiT) and _is_plain(model) else None
    check_options(copied and copied.config, inference, next(model.parameters()).device)
    if copied is None or not isinstance(copied.config, ClassModelConfig):
        return model
    return Prepared(copied, inference)


def _is_plain(model: DiT) -> bool:
    """Whether the copy computes what the network does: DiT's own forward pass, and modulations that are one product."""
    names = ("forward", "modulations", "arranged", "adaln_layers", "condition")
    return all(getattr(type(model), name) is getattr(DiT, name) for name in names) and all(
        type(layer) is nn.Sequential and [type(one) for one in layer] == [nn.SiLU, nn.Linear]
        for layer in model.adaln_layers()
    )


def check_options(config: Any, inference: InferenceOptions, device: torch.device) -> None:
    """RequestError for options that exclude each other or that this network or device does not support."""
    if inference.int8 and inference.compiled:
        raise RequestError("int8: its products cannot be compiled; choose int8 or compile")
    for name in ("int8", "graph", "host_modulation", "compiled", "packed"):
        if getattr(inference, name) and not isinstance(config, ClassModelConfig):
            raise RequestError(f"{name}: only class-conditional Large-DiT networks support it")
    if inference.graph and device.type != "cuda":
        raise RequestError(f"graph: CUDA graphs need a GPU, got {device}")


class Prepared(InferenceCopy):
    """See `prepare`. Call `plan` before the first step of a batch; to share a copy, call `for_request` first."""

    def __init__(self, model: DiT, inference: InferenceOptions) -> None:
        weight = model.x_embedder.weight
        self.model, self.inference = model, inference
        self.device, self.dtype = weight.device, weight.dtype
        self.blocks = [_prepared_block(block, inference) for block in model.blocks]
        self.modulations = ModulationCache(model, inference.host_modulation)
        self._kernels = attention_kernels(self.device, self.dtype, model.config.head_dim)
        self._choosing = _CHOOSING if self.device.type == "cuda" else nullcontext()
        self._tables = TableCache(_MOST_TABLES)
        has_graphs = self.device.type == "cuda" if inference.graph is None else inference.graph
        self.graphs = Graphs() if has_graphs else None
        self._weights_at_start = self._weights_state()

    def is_current(self) -> bool:
        """Whether the model still has the weights that this copy computes with.

        Not after `model.to(…)` moved or converted them. With int8, not after they were changed in place.
        """
        return self._weights_state() == self._weights_at_start

    def _weights_state(self) -> list[tuple[int, torch.dtype, int]]:
        """Address, dtype and, with int8, version of every shared weight. The adaLN weights may move."""
        shared = (p for name, p in self.model.layers.named_parameters() if "adaLN_modulation" not in name)
        return [(p.data_ptr(), p.dtype, p._version if self.inference.int8 else 0) for p in shared]

    def for_request(self) -> "Prepared":
        """A copy for one request: it shares weights, tables and graphs, and has its own `plan` and `release`.

        Steps of several requests may interleave, and another thread may continue a request. So no lock is held between
        steps; each request has its own state instead.
        """
        own = copy.copy(self)
        own.modulations = ModulationCache(self.model, self.inference.host_modulation)
        return own

    def release(self) -> bool:
        """Free all graphs and continue without them; whether there were any. Other copies capture theirs again."""
        graphs, self.graphs = self.graphs, None
        if graphs is not None:
            graphs.forget()
        return graphs is not None

    @torch.no_grad()
    def plan(self, pairs: Iterable[Pair]) -> None:
        """Announce the (time, label) that will be asked for, in order, so that their conditioning is computed together.

        Times are the network's; labels are those of the batch, and the null class where it is guided. A new plan drops
        what was computed for the last one, the same plan keeps it. So call `plan([])` after changing weights in place.
        """
        self.modulations.plan(pairs)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, time: Tensor, cond: Tensor, *, grid: GridScale | None = None, mid: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, C, H, W) in the network's dtype, time (B,) fp32, cond (B,) labels -> (B, out_channels, H, W); with
        `mid` that of the second head besides.

        time and cond may be on the host whatever the device; then a call does not wait for the device.
        """
        inputs = [x, self.modulations(time, cond), self._table(x, grid)]
        if self.model.class_tokens:  # else the labels are in the modulations alone
            inputs.append(cond.to(self.device, non_blocking=True))
        body = self._both if mid else self._body
        with self._choosing, self._kernels():
            out = body(*inputs) if self.graphs is None else self.graphs(body, *inputs)
        return tuple(out.chunk(2, dim=1)) if mid else out  # type: ignore[return-value]

    def _table(self, x: Tensor, grid: GridScale | None) -> Tensor:
        return self._tables.get((*x.shape[-2:], grid), lambda: self.model.positions(x, grid))

    def _body(self, x: Tensor, rows: Tensor, rope: Tensor, labels: Tensor | None = None) -> Tensor:
        """The forward pass over the blocks of this copy: the part that a CUDA graph captures."""
        modulations = self.model.arranged(rows.split(self.modulations.widths, dim=1))
        out = self.model.compute(x, rope, self.blocks, modulations, labels)
        assert isinstance(out, Tensor)
        return out

    def _both(self, x: Tensor, rows: Tensor, rope: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same with the second head, whose output follows in the channels."""
        modulations = self.model.arranged(rows.split(self.modulations.widths, dim=1))
        out = self.model.compute(x, rope, self.blocks, modulations, labels, mid=True)
        assert isinstance(out, tuple)
        return torch.cat(out, dim=1)


def _prepared_block(block: Block, inference: InferenceOptions) -> Block:
    # Products are joined on a GPU, unless the options say otherwise, and where they are the package's own.
    packable = is_packable(block)
    if inference.int8 and not packable:
        raise RequestError(f"int8: attention or FFN of {type(block).__name__} is not the package's own")
    if inference.int8:
        return packed_block(block, Int8Linear)
    on_cpu = next(block.parameters()).device.type == "cpu"
    joined = not on_cpu if inference.packed is None else inference.packed
    twin = packed_block(block) if joined and packable else shell(block)
    if inference.compiled:
        twin.forward = _compiled(twin.forward)  # type: ignore[method-assign]
    return twin


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for the size of the first images, and for any size once another comes, always for any number of rows.

    The number of rows changes within a request: with and without guidance, in the last batch, in halves.
    """
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, _MOST_COMPILED)
    run = torch.compile(forward)

    def call(x: Tensor, rope: Tensor, modulation: Tensor, **more: Any) -> Any:
        if x._is_view():  # only in the first block, where torch would compile again for it
            x = x.clone()
        for value in (x, modulation):
            torch._dynamo.maybe_mark_dynamic(value, 0)
        return run(x, rope, modulation, **more)

    return call
