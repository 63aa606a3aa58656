"""Greedy decoding in one call: the loop around a language model's step, without Python in it."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slim.codegen.cpp.text import FORMATS
from slim.codegen.executables import Ends, Feedback
from slim.codegen.regions.matrices import FLOAT_FORMATS

if TYPE_CHECKING:
    from slim.codegen.cpp.executable import BoundCall


class _Greedy(ctypes.Structure):
    """The struct of that name in greedy.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "batch", "vocabulary", "capacity", "end_count", "made")),
        *((name, ctypes.c_int64) for name in ("mask_index", "length", "pad")),
        ("logits", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "mask", "seen", "lengths")),
        *((name, ctypes.c_void_p) for name in ("ends", "finished", "chosen")),
    ]


class GreedyCall:
    """A bound step of a language model, to be repeated on the likeliest tokens."""

    def __init__(self, call: BoundCall, feedback: Feedback, ends: Ends) -> None:
        self._call = call
        self._outputs = call.outputs()
        logits = self._outputs[feedback.logits]
        tokens = call.inputs[feedback.tokens]
        self._kept = [logits, tokens, ends]  # alive as long as their addresses are
        self._keys: int | None = None
        self._loop = _Greedy(
            batch=tokens.shape[0], vocabulary=logits.shape[-1], end_count=ends.tokens.numel(), pad=ends.pad,
            logits=logits.data_ptr(), format=FORMATS[FLOAT_FORMATS[logits.dtype]], tokens=tokens.data_ptr(),
            ends=ends.tokens.data_ptr(), finished=ends.finished.data_ptr(), mask_index=-1,
        )  # fmt: skip
        if feedback.positions is not None:
            self._loop.positions = call.inputs[feedback.positions].data_ptr()
        if feedback.lengths is not None:
            self._loop.lengths = call.inputs[feedback.lengths].data_ptr()

    def over(self, mask: Tensor, index: int, keys: int) -> GreedyCall:
        """Itself, over a cache whose keys ``mask`` [B, capacity] says are there: input ``index``, size ``keys``."""
        seen = torch.empty(mask.shape, dtype=torch.bool)
        self._kept += [mask, seen]
        self._keys, loop = keys, self._loop
        loop.capacity, loop.mask_index, loop.length = mask.shape[1], index, keys
        loop.mask, loop.seen = mask.data_ptr(), seen.data_ptr()
        return self

    def __call__(self, steps: int, held: int) -> Tensor:
        """See ``GreedySteps``."""
        chosen = torch.empty(steps, self._loop.batch, dtype=torch.int64)
        self._loop.steps, self._loop.chosen = steps, chosen.data_ptr()
        if self._keys is not None:
            self._call.dims[self._keys] = held
        self._call.executable.decode(self._call.io, self._call.dims, self._loop)
        return chosen[: self._loop.made]


def greedy_call(call: BoundCall, feedback: Feedback, mask: Tensor | None, ends: Ends) -> GreedyCall | None:
    """None where a step has parts that PyTorch runs, or sizes that more than the mask decides."""
    executable = call.executable
    _, dtype = executable.outputs[feedback.logits]
    if executable.schedule.foreign or dtype not in FLOAT_FORMATS:
        return None
    if mask is None or feedback.mask is None:
        return GreedyCall(call, feedback, ends) if feedback.lengths is not None else None
    keys = next((place for place, owner in enumerate(executable.where) if owner == (feedback.mask, 1)), None)
    return None if keys is None else GreedyCall(call, feedback, ends).over(mask, feedback.mask, keys)
