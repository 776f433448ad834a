"""The weights of a run: fp32 masters that the optimiser updates, and the network that computes with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ldit.parallel.layout import Layout, Part

Read = Callable[[str, Layout, Part], Tensor]
"""Returns this rank's part of a parameter, given its name, layout and part."""


class Weights:
    """`masters[i]` is this rank's part of parameter `names[i]`; `fixed` names parameters that are not trained. A master
    is an ordinary fp32 tensor in all three cases:

    - one process in fp32: the network's own parameter;
    - one process in bf16 or fp16: a separate tensor; the network holds a low-precision copy;
    - FSDP2: the local part of the network's sharded parameter. FSDP2 makes the low-precision copies itself, but not in
      a world of one, hence the second case.

    `model` comes on the meta device with parallelism applied; its memory is allocated here. `place` is this rank's
    place in the group that holds one whole model.
    """

    def __init__(
        self,
        model: nn.Module,
        layouts: Mapping[str, Layout],
        device: torch.device | str = "cpu",
        compute: torch.dtype = torch.float32,
        place: tuple[int, int] = (0, 0),
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        self.compute = compute
        self.names = list(layouts)
        self.layouts = list(layouts.values())
        self.parts = [layout.part(*place) for layout in self.layouts]
        # Allocate the network, in low precision if it is to be a copy.
        sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self._copied = not sharded and compute != torch.float32
        if self._copied:
            model.to(compute)
        model.to_empty(device=device)
        # In the order of the axes: masters, averages and moments are read in pieces.
        for p in model.parameters():
            if not isinstance(p, DTensor) and not p.is_contiguous():
                p.data = p.data.contiguous()
        self._own: list[Tensor] = list(model.parameters())
        self.fixed = frozenset(name for name, own in zip(self.names, self._own, strict=True) if not own.requires_grad)
        self._grads: list[Tensor | None] = [None] * len(self._own)
        # The master of each parameter, in one of the three cases.
        self.masters: list[nn.Parameter] = []
        for index, own in enumerate(self._own):
            if isinstance(own, DTensor):
                self.masters.append(nn.Parameter(own.to_local().detach(), requires_grad=False))
            elif self._copied:
                self.masters.append(nn.Parameter(torch.empty_like(own, dtype=torch.float32), requires_grad=False))
                if own.requires_grad:
                    own.register_post_accumulate_grad_hook(self._into(index))
            else:
                assert isinstance(own, nn.Parameter)
                self.masters.append(own)

    def _into(self, index: int) -> Callable[[Tensor], None]:
        """A hook that takes a low-precision gradient as soon as it exists. The first micro-batch's is kept as it is;
        from the second on they are added in fp32."""

        def hook(own: Tensor) -> None:
            held, grad = self._grads[index], own.grad
            assert grad is not None
            self._grads[index] = grad if held is None else held.to(torch.float32).add_(grad)
            own.grad = None

        return hook

    @torch.no_grad()
    def fill(self, read: Read) -> None:
        """Set every master, one by one, then the network."""
        for name, layout, part, master in zip(self.names, self.layouts, self.parts, self.masters, strict=True):
            master.copy_(read(name, layout, part))
        self.sync_to_model()

    @torch.no_grad()
    def put(self, name: str, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Set a master from a full tensor, or only the given full rows of it. Call `sync_to_model` after the last."""
        index = self.names.index(name)
        master, part = self.masters[index], self.parts[index]
        if rows is None:
            master.copy_(value[part])
            return
        # Rows may belong to another rank; columns are cut to this rank's.
        low, high = part[0].start, part[0].stop
        for row, numbers in zip(rows, value[(slice(None), *part[1:])], strict=True):
            if low <= row < high:
                master[row - low].copy_(numbers)

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Copy the masters to the network, where they are not its own parameters."""
        if self._copied:
            torch._foreach_copy_(self._own, list[Tensor](self.masters))

    @property
    def copies(self) -> list[Tensor]:
        """The network's low-precision copies of the masters; empty where it computes with the masters, or FSDP2 makes
        the copies."""
        return list(self._own) if self._copied else []

    def gradients(self) -> list[Tensor]:
        """The gradient of each master after the last backward pass; zeros for parameters that it did not reach. In
        fp32, or in the network's own precision if there was one micro-batch."""
        for index, own in enumerate(self._own):
            if own.grad is not None:
                self._grads[index] = own.grad.to_local() if isinstance(own.grad, DTensor) else own.grad
        dtypes = {held.dtype for held in self._grads if held is not None}
        dtype = torch.float32 if len(dtypes) != 1 else dtypes.pop()
        return [
            torch.zeros_like(master, dtype=dtype) if held is None else held.to(dtype)
            for held, master in zip(self._grads, self.masters, strict=True)
        ]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for index, own in enumerate(self._own):
            own.grad = self._grads[index] = None

    @contextmanager
    @torch.no_grad()
    def swapped_in(self, values: Sequence[Tensor]) -> Iterator[nn.Module]:
        """The network, in eval mode, with `values` for its weights while the block runs: an EMA, for example. There is
        no second network.

        Where the network's parameters are the masters, masters and `values` are swapped, and swapped back bit for bit.
        """
        was_training = self.model.training
        self._show(values)
        try:
            yield self.model.eval()
        finally:
            self.model.train(was_training)
            if self._copied:
                self.sync_to_model()
            else:
                self._show(values)

    def _show(self, values: Sequence[Tensor]) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # A forward pass without a backward pass leaves some units gathered: they would keep the old weights.
                module.reshard()
        if self._copied:
            torch._foreach_copy_(self._own, list(values))
            return
        for master, value in zip(self.masters, values, strict=True):
            kept = master.detach().clone()
            master.copy_(value)
            value.copy_(kept)
