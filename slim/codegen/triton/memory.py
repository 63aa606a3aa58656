"""Memory that one call's kernels pass to each other: what is not needed at once takes turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from slim.codegen.regions.views import Buffer, Size

_ALIGNMENT = 256  # bytes: what CUDA's own allocations begin on


class Arena:
    """Room for temporary buffers.

    Attributes:
        nbytes: of all of it.
    """

    def __init__(self, uses: Sequence[Iterable[Buffer]], size: Callable[[Size], int]) -> None:
        """``uses`` are the temporary buffers that each step of the call touches, in order."""
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for step, buffers in enumerate(uses):
            for buffer in buffers:
                first.setdefault(buffer, step)
                last[buffer] = step
        self._shapes = {buffer: [size(s) for s in buffer.shape] for buffer in first}
        self._slots: list[int] = []
        self._slot_of: dict[Buffer, int] = {}
        busy: list[int] = []
        for buffer in first:  # dicts keep the order of first use
            self._slot_of[buffer] = self._place(self._bytes(buffer), first[buffer], busy)
            busy[self._slot_of[buffer]] = last[buffer]
        self._offsets = [sum(self._slots[:slot]) for slot in range(len(self._slots))]
        self.nbytes = sum(self._slots)

    def _bytes(self, buffer: Buffer) -> int:
        count = buffer.dtype.itemsize
        for size in self._shapes[buffer]:
            count *= size
        return -(-count // _ALIGNMENT) * _ALIGNMENT

    def _place(self, nbytes: int, step: int, busy: list[int]) -> int:
        """The free slot that fits best: the smallest large enough, else the largest, which grows; else a new one."""
        free = [slot for slot, until in enumerate(busy) if until < step]
        fitting = [slot for slot in free if self._slots[slot] >= nbytes]
        if fitting:
            return min(fitting, key=lambda slot: self._slots[slot])
        if not free:
            self._slots.append(nbytes)
            busy.append(-1)
            return len(self._slots) - 1
        largest = max(free, key=lambda slot: self._slots[slot])
        self._slots[largest] = nbytes
        return largest

    def allocate(self, device: torch.device) -> dict[Buffer, Tensor]:
        """A tensor for each buffer, over one allocation."""
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        return {buffer: self._view(memory, buffer) for buffer in self._slot_of}

    def _view(self, memory: Tensor, buffer: Buffer) -> Tensor:
        start = self._offsets[self._slot_of[buffer]]
        shape = self._shapes[buffer]
        count = torch.Size(shape).numel() * buffer.dtype.itemsize
        return memory[start : start + count].view(buffer.dtype).view(shape)
