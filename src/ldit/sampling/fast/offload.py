"""Models larger than the device: blocks stay on the host and are streamed to the device while they compute.

A block is two loans, its modulation and the rest, since networks make all modulations before the first block. On CUDA
the weights lie in page-locked memory, and the loan that followed last time is copied by a second stream while this one
computes. On the CPU the weights are the pages of the files themselves: the system reads them, and drops them again
where memory is short, so that a model may be larger than memory. Where their dtype is another than that of the
computation, one loan at a time is converted; else they are used where they lie.
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ldit.errors import RequestError
from ldit.sampling.fast.options import OFFLOADED

_ALIGNED = 64  # values: every parameter in a buffer begins at a multiple of at least 128 bytes
_PORTABLE = 1  # locked for every CUDA device, cudaHostRegisterPortable


def offload(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Change `model` in place so that it computes on `device` in `dtype` with its blocks on the host; returns it.

    Its parameters are on the CPU in any floating dtype, best as `load_model` leaves them without a dtype: mapped from
    the files. What is no block moves to the device. The device holds two loans (one outside CUDA), each at most a
    block; parameters of blocks are on the host between calls. Calls from several threads take turns.

    The numbers are those of the same model moved whole. RequestError when the host cannot lock the memory.
    """
    device = torch.device(device)
    loans = {module: _HostBlock(parameters) for module, parameters in _parts(model)}
    lent = {id(p) for loan in loans.values() for p in loan.parameters}
    for p in model.parameters():
        if id(p) not in lent:
            p.data = p.data.to(device, dtype)
    if device.type == "cpu":
        loans = {module: loan for module, loan in loans.items() if any(t.dtype != dtype for t in loan.host)}
    if loans:
        _install(model, loans, _lender(list(loans.values()), device, dtype))
    setattr(model, OFFLOADED, True)
    return model


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules and the parameters that their forward needs, in the order of the blocks."""
    blocks: Any = model.layers if hasattr(model, "layers") else model.blocks
    for block in blocks:
        modulation = list(block.adaLN_modulation.parameters())
        apart = {id(p) for p in modulation}
        yield block.adaLN_modulation, modulation
        yield block, [p for p in block.parameters() if id(p) not in apart]


class _HostBlock:
    """Parameters that are streamed together; `host` are their values on the host."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.host = [p.data for p in parameters]
        ends = accumulate(-(-p.numel() // _ALIGNED) * _ALIGNED for p in parameters)
        *self.starts, self.size = 0, *ends

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' places in `flat` (at least `size`,)."""
        places = zip(self.starts, self.host, strict=True)
        return [flat[start : start + home.numel()].view(home.shape) for start, home in places]

    def point(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.data = value

    def lock(self, dtype: torch.dtype) -> Tensor:
        """Move home to one page-locked piece of memory in `dtype`, which is returned. (What torch pins by itself is
        rounded up to a power of two: up to twice the model.)"""
        flat = torch.empty(self.size, dtype=dtype)
        if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, _PORTABLE)):
            raise RequestError(f"offload: the host cannot lock {flat.nbytes / 1e9:.1f} GB more of its memory")
        locked = self.views(flat)
        for place, home in zip(locked, self.host, strict=True):
            place.copy_(home)
        self.host = locked
        self.point(locked)
        return flat


class _Slot:
    """A buffer on the device that holds one loan at a time; copies are done when `fill` returns."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self.holds: _HostBlock | None = None

    def fill(self, loan: _HostBlock) -> None:
        self.holds = None  # unless all of it arrives
        for place, home in zip(loan.views(self.flat), loan.host, strict=True):
            place.copy_(home, non_blocking=True)
        self.holds = loan

    def wait(self) -> None:
        """What is queued from here on finds the loan in place."""

    def leave(self) -> None:
        """What was queued up to here is the last to read the loan."""


class _CudaSlot(_Slot):
    """The same, filled by a stream of its own beside the one that computes."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
        super().__init__(size, device, dtype)
        self.stream, self.filled, self.left = stream, torch.cuda.Event(), torch.cuda.Event()
        self.leave()  # the memory may have been another tensor's, which what is queued still reads
        self.flat.record_stream(stream)  # and is not given away while a copy is on its way

    def fill(self, loan: _HostBlock) -> None:
        self.stream.wait_event(self.left)
        with torch.cuda.stream(self.stream):
            super().fill(loan)
        self.filled.record(self.stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self.flat.device).wait_event(self.filled)

    def leave(self) -> None:
        self.left.record(torch.cuda.current_stream(self.flat.device))


class _Lender:
    """Lends through slots, by turns; with more than one, the loan that followed last time is fetched ahead."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self.slots, self.turn = slots, 0  # the slot in turn is not in use
        self.before: _HostBlock | None = None
        self.follows: dict[_HostBlock, _HostBlock] = {}
        self.one_call = threading.Lock()

    @contextmanager
    def lent(self, loan: _HostBlock) -> Iterator[None]:
        """Within the block the loan's parameters are on the device."""
        if self.before is not None:
            self.follows[self.before] = loan
        self.before = loan
        slot = self._with(loan)
        slot.wait()
        self.turn = (self.slots.index(slot) + 1) % len(self.slots)
        following = self.follows.get(loan)
        if following is not None and len(self.slots) > 1:
            self._with(following)
        try:
            loan.point(loan.views(slot.flat))
            yield
        finally:
            loan.point(loan.host)
            slot.leave()

    def _with(self, loan: _HostBlock) -> _Slot:
        """The slot that holds the loan; the next in turn, filled now, if none does."""
        for slot in self.slots:
            if slot.holds is loan:
                return slot
        slot = self.slots[self.turn]
        slot.fill(loan)
        return slot


def _lender(loans: list[_HostBlock], device: torch.device, dtype: torch.dtype) -> _Lender:
    size = max(loan.size for loan in loans)
    if device.type != "cuda":
        return _Lender([_Slot(size, device, dtype)])
    stream = torch.cuda.Stream(device)
    lender = _Lender([_CudaSlot(size, device, dtype, stream) for _ in range(2)])
    locked: list[Tensor] = []
    weakref.finalize(lender, _unlock, stream, locked)  # of those before, too, if one cannot be locked
    for loan in loans:
        locked.append(loan.lock(dtype))
    return lender


def _unlock(stream: torch.cuda.Stream, locked: list[Tensor]) -> None:
    """The finaliser holds the tensors until then: memory must not be freed while it is locked or copied from."""
    stream.synchronize()
    for flat in locked:
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


def _install(model: nn.Module, loans: dict[nn.Module, _HostBlock], lender: _Lender) -> None:
    for module, loan in loans.items():
        module.forward = _within(module, partial(lender.lent, loan))
    model.forward = _within(model, lambda: lender.one_call)


def _within(module: nn.Module, context: Callable[[], Any]) -> Callable[..., Any]:
    """The module's forward inside a context. It must not hold the module, which holds it: that would keep gigabytes
    until the next collection of cycles."""
    reference = weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        own = reference()
        assert own is not None
        with context():
            return type(own).forward(own, *args, **kwargs)

    return forward
