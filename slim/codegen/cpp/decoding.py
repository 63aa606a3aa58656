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
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "mask", "seen", "ends", "finished", "chosen")),
    ]


class GreedyCall:
    """A bound step of a language model, to be repeated on the likeliest tokens."""

    def __init__(self, call: BoundCall, feedback: Feedback, mask: Tensor, ends: Ends, keys: int) -> None:
        self._call = call
        self._outputs = call.outputs()
        logits = self._outputs[feedback.logits]
        tokens = call.inputs[feedback.tokens]
        positions = None if feedback.positions is None else call.inputs[feedback.positions]
        self._kept = (mask, ends, torch.empty(mask.shape, dtype=torch.bool))  # alive as long as their addresses are
        self._loop = _Greedy(
            batch=mask.shape[0], vocabulary=logits.shape[-1], capacity=mask.shape[1], end_count=ends.tokens.numel(),
            mask_index=feedback.mask, length=keys, pad=ends.pad, logits=logits.data_ptr(),
            format=FORMATS[FLOAT_FORMATS[logits.dtype]], tokens=tokens.data_ptr(),
            positions=None if positions is None else positions.data_ptr(), mask=mask.data_ptr(),
            seen=self._kept[-1].data_ptr(), ends=ends.tokens.data_ptr(), finished=ends.finished.data_ptr(),
        )  # fmt: skip

    def __call__(self, steps: int, held: int) -> Tensor:
        """See ``GreedySteps``."""
        chosen = torch.empty(steps, self._loop.batch, dtype=torch.int64)
        self._loop.steps, self._loop.chosen = steps, chosen.data_ptr()
        self._call.dims[self._loop.length] = held
        self._call.executable.decode(self._call.io, self._call.dims, self._loop)
        return chosen[: self._loop.made]


def greedy_call(call: BoundCall, feedback: Feedback, mask: Tensor, ends: Ends) -> GreedyCall | None:
    """None where a step has parts that PyTorch runs, or sizes that more than the mask decides."""
    executable = call.executable
    keys = next((place for place, owner in enumerate(executable.where) if owner == (feedback.mask, 1)), None)
    _, dtype = executable.outputs[feedback.logits]
    if executable.schedule.foreign or dtype not in FLOAT_FORMATS or keys is None:
        return None
    return GreedyCall(call, feedback, mask, ends, keys)
