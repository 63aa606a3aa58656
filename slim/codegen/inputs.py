"""What generated code trusts its inputs to be, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slim import errors
from slim.codegen.regions.views import Buffer


def check_shape(buffer: Buffer, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises BadInput unless ``tensor`` has the shape that the other inputs say."""
    if tuple(tensor.shape) != tuple(shape):
        reason = f"its shape is {list(tensor.shape)}, and beside the other inputs it must be {list(shape)}"
        raise errors.BadInput(argument=buffer.name, reason=reason)


def check_kind(buffer: Buffer, tensor: Tensor, device: torch.device) -> None:
    """Raises BadInput unless ``tensor`` lies on ``device`` and has the type that was compiled."""
    if tensor.device.type != device.type:
        where = "the CPU" if device.type == "cpu" else str(device)
        raise errors.BadInput(argument=buffer.name, reason=f"it lies on {tensor.device}, and the code runs on {where}")
    if tensor.dtype != buffer.dtype:
        reason = f"it is {tensor.dtype}, and the program was compiled for {buffer.dtype}"
        raise errors.BadInput(argument=buffer.name, reason=reason)


def check_writable(buffer: Buffer, tensor: Tensor) -> None:
    """Raises BadInput for a cache whose numbers would be written into a copy."""
    if not tensor.is_contiguous():
        raise errors.BadInput(argument=buffer.name, reason="a cache that is written to must be contiguous")
