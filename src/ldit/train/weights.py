"""The weights of a run: fp32 masters that the optimiser moves, and the network that computes with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ldit.parallel.layout import Layout, Part

Read = Callable[[str, Layout, Part], Tensor]
"""The numbers of a parameter that this process holds, given its name, layout and part."""


class Weights:
    """`masters[i]` is this process's part of parameter `names[i]`, an ordinary fp32 tensor in all three forms:

    - one process in fp32: the network's own parameter;
    - one process in bf16 or fp16: apart from it; the network holds a low-precision copy;
    - FSDP2: the local part of the network's sharded parameter; FSDP2 makes low-precision copies itself (it makes none
      in a world of one, hence the second form).

    The network comes on the meta device with parallelism applied, and is given memory here.
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
        sharded = any(isinstance(p, DTensor) for p in model.parameters())
        self._copied = not sharded and compute != torch.float32
        if self._copied:
            model.to(compute)
        model.to_empty(device=device)
        self._own: list[Tensor] = list(model.parameters())
        self.masters: list[nn.Parameter] = []
        for index, own in enumerate(self._own):
            if isinstance(own, DTensor):
                self.masters.append(nn.Parameter(own.to_local().detach(), requires_grad=False))
            elif self._copied:
                self.masters.append(nn.Parameter(torch.empty_like(own, dtype=torch.float32), requires_grad=False))
                own.register_post_accumulate_grad_hook(self._into(index))
            else:
                assert isinstance(own, nn.Parameter)
                self.masters.append(own)

    def _into(self, index: int) -> Callable[[Tensor], None]:
        """Adds a low-precision gradient to the master's as soon as it is there, so that they never stand side by
        side for the whole network."""

        def hook(own: Tensor) -> None:
            master, grad = self.masters[index], own.grad
            assert grad is not None
            master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
            own.grad = None

        return hook

    @torch.no_grad()
    def fill(self, read: Read) -> None:
        """Put numbers into every master, one by one, then into the network."""
        for name, layout, part, master in zip(self.names, self.layouts, self.parts, self.masters, strict=True):
            master.copy_(read(name, layout, part))
        self.sync_to_model()

    @torch.no_grad()
    def put(self, name: str, value: Tensor, rows: Sequence[int] | None = None) -> None:
        """Put a whole tensor, or some whole rows of one, into a master; `publish` after the last."""
        index = self.names.index(name)
        master, part = self.masters[index], self.parts[index]
        if rows is None:
            master.copy_(value[part])
            return
        low, high = part[0].start, part[0].stop
        for row, numbers in zip(rows, value[(slice(None), *part[1:])], strict=True):
            if low <= row < high:
                master[row - low].copy_(numbers)

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Refresh the network from the masters."""
        if self._copied:
            torch._foreach_copy_(self._own, list[Tensor](self.masters))

    def gradients(self) -> list[Tensor]:
        """The masters' fp32 gradients after the last backward pass; zeros where it did not come by."""
        for own, master in zip(self._own, self.masters, strict=True):
            if isinstance(own.grad, DTensor):
                master.grad, own.grad = own.grad.to_local(), None
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters if master.grad is not None]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for own, master in zip(self._own, self.masters, strict=True):
            own.grad = master.grad = None

    @contextmanager
    @torch.no_grad()
    def swapped_in(self, values: Sequence[Tensor]) -> Iterator[nn.Module]:
        """The network with other numbers, such as an average, for as long as the block runs; no second network.

        Where the network's parameters are the masters, the two change places, bit for bit, and change back.
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
                # A forward pass without a backward one leaves some units gathered: they would go on with old numbers.
                module.reshard()
        if self._copied:
            torch._foreach_copy_(self._own, list(values))
            return
        for master, value in zip(self.masters, values, strict=True):
            kept = master.detach().clone()
            master.copy_(value)
            value.copy_(kept)
