"""Models larger than the device: blocks stay on the host and are streamed to the device while they compute.

The parameters of a block are streamed as two groups, its modulation and the rest, because the modulation is computed
outside of the block's call. On CUDA the weights are in page-locked memory. While one group computes, a second
stream copies the group that came next in the last pass. On the CPU the weights are memory-mapped from their files: the
system reads them, and drops them when memory is short, so that a model may be larger than memory. Weights of another
dtype than that of the computation are converted a group at a time; others are used in place.
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

_ALIGNED = 64  # values: every parameter in a buffer starts at a multiple of at least 128 bytes
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every CUDA device


def offload(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Change `model` in place so that it computes on `device` in `dtype` with its blocks on the host; returns it.

    Its parameters must be on the CPU, in any floating dtype; best memory-mapped from their files, as `load_model`
    leaves them without a dtype. Everything outside the blocks moves to the device. The device holds at most two groups
    of parameters at a time (one outside CUDA), each at most a block. Calls from several threads take turns.

    Outputs equal those of the same model moved to the device. RequestError if the host cannot lock the memory.
    """
    device = torch.device(device)
    # What is no block's moves to the device.
    groups = {module: _ParameterGroup(parameters) for module, parameters in _groups_of(model)}
    streamed = {id(p) for group in groups.values() for p in group.parameters}
    for p in model.parameters():
        if id(p) not in streamed:
            p.data = p.data.to(device, dtype)
    # On the CPU only groups that need another dtype are copied.
    if device.type == "cpu":
        groups = {module: group for module, group in groups.items() if any(t.dtype != dtype for t in group.host)}
    if groups:
        _install(model, groups, _streamer(list(groups.values()), device, dtype))
    setattr(model, OFFLOADED, True)
    return model


def _groups_of(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules, and the parameters that each one's forward needs, in the order of the blocks."""
    blocks: Any = model.layers if hasattr(model, "layers") else model.blocks
    for block in blocks:
        modulation = [] if block.adaLN_modulation is None else list(block.adaLN_modulation.parameters())
        excluded = {id(p) for p in modulation}
        if modulation:
            yield block.adaLN_modulation, modulation
        yield block, [p for p in block.parameters() if id(p) not in excluded]


class _ParameterGroup:
    """Parameters that are streamed together; `host` has their values on the host."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.host = [p.data for p in parameters]
        ends = accumulate(-(-p.numel() // _ALIGNED) * _ALIGNED for p in parameters)
        *self.starts, self.size = 0, *ends

    def views(self, flat: Tensor) -> list[Tensor]:
        """A view for each parameter in `flat`, a buffer of at least `size` values."""
        places = zip(self.starts, self.host, strict=True)
        return [flat[start : start + values.numel()].view(values.shape) for start, values in places]

    def point(self, values: Sequence[Tensor]) -> None:
        """Make the parameters refer to these values."""
        for p, value in zip(self.parameters, values, strict=True):
            p.data = value

    def lock(self, dtype: torch.dtype) -> Tensor:
        """Copy the host's values to one page-locked buffer in `dtype`, use them from there, and return the buffer.

        torch's own pinned memory is rounded up to a power of two, which may double the size of the model.
        """
        flat = torch.empty(self.size, dtype=dtype)
        if int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, _PORTABLE)):
            raise RequestError(f"offload: the host cannot lock {flat.nbytes / 1e9:.1f} GB more of its memory")
        locked = self.views(flat)
        for target, values in zip(locked, self.host, strict=True):
            target.copy_(values)
        self.host = locked
        self.point(locked)
        return flat


class _Slot:
    """A buffer on the device for one group at a time. Here `fill` returns when the copy is done."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self.group: _ParameterGroup | None = None

    def fill(self, group: _ParameterGroup) -> None:
        """Copy the group to the buffer."""
        self.group = None  # in case a copy fails half-way
        for target, values in zip(group.views(self.flat), group.host, strict=True):
            target.copy_(values, non_blocking=True)
        self.group = group

    def wait(self) -> None:
        """Work queued after this call starts when the copy is complete."""

    def release(self) -> None:
        """The buffer may be filled again once the work queued before this call is done."""


class _CudaSlot(_Slot):
    """A buffer that is filled by a second CUDA stream, while the first one computes."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype, stream: torch.cuda.Stream) -> None:
        super().__init__(size, device, dtype)
        self.stream, self.filled, self.free = stream, torch.cuda.Event(), torch.cuda.Event()
        self.release()  # queued work may still read a tensor that had this memory before
        self.flat.record_stream(stream)  # the allocator must not reuse the memory while the stream copies to it

    def fill(self, group: _ParameterGroup) -> None:
        self.stream.wait_event(self.free)
        with torch.cuda.stream(self.stream):
            super().fill(group)
        self.filled.record(self.stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self.flat.device).wait_event(self.filled)

    def release(self) -> None:
        self.free.record(torch.cuda.current_stream(self.flat.device))


class _Streamer:
    """Streams groups through slots in turn. With two slots it fetches ahead the group that came next last time."""

    def __init__(self, slots: Sequence[_Slot]) -> None:
        self.slots, self.free = slots, 0  # index of the slot that is filled next; it is not in use
        self.last: _ParameterGroup | None = None
        self.next_of: dict[_ParameterGroup, _ParameterGroup] = {}
        self.one_call = threading.Lock()

    @contextmanager
    def on_device(self, group: _ParameterGroup) -> Iterator[None]:
        """Within the block the group's parameters are on the device."""
        # Learn the order of the groups.
        if self.last is not None:
            self.next_of[self.last] = group
        self.last = group
        # Wait for this group, then start copying the next one to the other slot.
        slot = self._slot_with(group)
        slot.wait()
        self.free = (self.slots.index(slot) + 1) % len(self.slots)
        following = self.next_of.get(group)
        if following is not None and len(self.slots) > 1:
            self._slot_with(following)
        # Compute with the copies on the device.
        try:
            group.point(group.views(slot.flat))
            yield
        finally:
            group.point(group.host)
            slot.release()

    def _slot_with(self, group: _ParameterGroup) -> _Slot:
        """The slot that holds the group. If none does, the free slot is filled with it."""
        for slot in self.slots:
            if slot.group is group:
                return slot
        slot = self.slots[self.free]
        slot.fill(group)
        return slot


def _streamer(groups: list[_ParameterGroup], device: torch.device, dtype: torch.dtype) -> _Streamer:
    size = max(group.size for group in groups)
    if device.type != "cuda":
        return _Streamer([_Slot(size, device, dtype)])
    stream = torch.cuda.Stream(device)
    streamer = _Streamer([_CudaSlot(size, device, dtype, stream) for _ in range(2)])
    locked: list[Tensor] = []
    weakref.finalize(streamer, _unlock, stream, locked)  # before locking: if one group fails, the others are unlocked
    for group in groups:
        locked.append(group.lock(dtype))
    return streamer


def _unlock(stream: torch.cuda.Stream, locked: list[Tensor]) -> None:
    """Finaliser. It keeps the tensors until here, because locked memory must not be freed, nor during a copy."""
    stream.synchronize()
    for flat in locked:
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


def _install(model: nn.Module, groups: dict[nn.Module, _ParameterGroup], streamer: _Streamer) -> None:
    for module, group in groups.items():
        module.forward = _within(module, partial(streamer.on_device, group))
    model.forward = _within(model, lambda: streamer.one_call)


def _within(module: nn.Module, context: Callable[[], Any]) -> Callable[..., Any]:
    """The module's forward inside a context.

    It refers to the module weakly: a cycle would keep gigabytes alive until Python's next collection of cycles.
    """
    reference = weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        target = reference()
        assert target is not None
        with context():
            return type(target).forward(target, *args, **kwargs)

    return forward
