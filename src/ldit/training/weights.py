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
        self._own: list[Tensor] = list(model.parameters())
        self.fixed = frozenset(name for name, own in zip(self.names, self._own, strict=True) if not own.requires_grad)
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
        """A hook that adds a low-precision gradient to the master's as soon as it exists, and frees it: the network
        never holds all gradients in both precisions."""

        def hook(own: Tensor) -> None:
            master, grad = self.masters[index], own.grad
            assert grad is not None
            master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
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

    def gradients(self) -> list[Tensor]:
        """The masters' fp32 gradients after the last backward pass; zeros for parameters that it did not reach."""
        for own, master in zip(self._own, self.masters, strict=True):
            if isinstance(own.grad, DTensor):
                master.grad, own.grad = own.grad.to_local(), None
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters if master.grad is not None]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for own, master in zip(self._own, self.masters, strict=True):
            own.grad = master.grad = None

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
