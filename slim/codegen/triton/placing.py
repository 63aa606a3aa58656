"""Weights where kernels read them: moved one at a time, as PyTorch keeps them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slim.codegen.regions.pairs import INVERSE, inverse
from slim.codegen.regions.views import Buffer
from slim.compiler.weights import Weights


def hold(weights: Weights, buffers: Sequence[Buffer], device: torch.device) -> list[Tensor]:
    """The memory of each weight buffer; ``weights`` holds the same tensors from here on."""
    return [_held(weights, buffer, device) for buffer in buffers]


def _held(weights: Weights, buffer: Buffer, device: torch.device) -> Tensor:
    name, raw = buffer.name, weights.raw(buffer.name)
    if buffer.packing == INVERSE:
        return inverse(weights[name]).to(device)
    tensor = (raw if isinstance(raw, Tensor) else weights[name]).detach()
    there = tensor.to(device).contiguous()
    if there is not raw:
        weights[name] = there
    return there.view(torch.uint8) if there.dtype == torch.float8_e4m3fn else there
