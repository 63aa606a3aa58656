"""Quantise and dequantise with the meaning of ONNX QuantizeLinear and DequantizeLinear; numbers of three and four bits.

The shape of ``scale`` says the granularity: [] per tensor, [n] along ``axis``, x's leading dimensions up to and with
``axis`` (one scale a row of each expert: [E, m] for x [E, m, n]), or x's shape with ``axis`` divided by ``group_size``
for groups along ``axis``. ``zero_point`` has the shape of ``scale``; None means 0 (symmetric).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.blocks import row_blocks
from slim.compiler.dialect._register import define


def spread(scale: Tensor, shape: torch.Size, axis: int | None, group_size: int | None) -> Tensor:
    """``scale`` broadcast against a tensor of ``shape``."""
    if axis is None:
        return scale
    if group_size is None and scale.dim() > 1:
        return scale.view(*scale.shape, *[1] * (len(shape) - scale.dim()))
    if group_size is None:
        view = [1] * len(shape)
        view[axis] = -1
        return scale.view(view)
    return scale.repeat_interleave(group_size, dim=axis)


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    low: int = -128,
    high: int = 127,
) -> Tensor:
    """clamp(round(x / scale) + zero_point, low, high) as int8; ties round to even."""
    steps = torch.round(x.float() / spread(scale.float(), x.shape, axis, group_size))
    if zero_point is not None:
        steps = steps + spread(zero_point.float(), x.shape, axis, group_size)
    return steps.clamp(low, high).to(torch.int8)


def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **kwargs: object) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format)


def _dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(q - zero_point) * scale, in float32, rounded to ``dtype``."""
    if q.dim() < 2 or (group_size is not None and axis == 0):
        return _restored(q, scale, zero_point, axis, group_size, dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    for rows in row_blocks(q.shape):  # or float32 copies of a large weight would be what fills the memory
        zeros = None if zero_point is None else _rows_of(zero_point, rows, axis)
        out[rows] = _restored(q[rows], _rows_of(scale, rows, axis), zeros, axis, group_size, dtype)
    return out


def _rows_of(grid: Tensor, rows: slice, axis: int | None) -> Tensor:
    """What of a scale or zero point belongs to some rows of a weight of two dimensions or more."""
    if axis is None or (grid.dim() == 1 and axis != 0):
        return grid
    return grid[rows]


def _restored(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, group_size: int | None, dtype: torch.dtype
) -> Tensor:
    steps = q.float()
    if zero_point is not None:
        steps = steps - spread(zero_point.float(), q.shape, axis, group_size)
    return (steps * spread(scale.float(), q.shape, axis, group_size)).to(dtype)


def _dequantize_fake(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format)


def pack_int4(q: Tensor) -> Tensor:
    """What ``unpack_int4`` makes ``q``, int8 [..., n] of -8..7 with n even, of: uint8 [..., n / 2]."""
    shifted = (q + 8).to(torch.uint8)
    return shifted[..., 0::2] | shifted[..., 1::2] << 4


def _unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [..., n / 2] as int8 [..., n]: column 2j is the low nibble of byte j, 2j + 1 the high one, each less 8."""
    low, high = packed & 15, packed >> 4
    return torch.stack([low, high], dim=-1).flatten(-2).to(torch.int8).sub_(8)


def _unpack_int4_fake(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.int8)


def pack_int3(q: Tensor) -> Tensor:
    """What ``unpack_int3`` makes ``q``, int8 [..., n] of -4..3 with 8 dividing n, of: uint8 [..., 3 n / 8]."""
    codes = (q + 4).to(torch.int32).unflatten(-1, (-1, 8))
    words = (codes << _SHIFTS.to(q.device)).sum(-1, dtype=torch.int32)
    return torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=-1).flatten(-2).to(torch.uint8)


def _unpack_int3(packed: Tensor) -> Tensor:
    """uint8 [..., 3 n / 8] as int8 [..., n]: three bytes, low one first, are 24 bits; number j of 8 is bits 3j to
    3j + 2, less 4."""
    low, mid, high = packed.to(torch.int32).unflatten(-1, (-1, 3)).unbind(-1)
    words = low | mid << 8 | high << 16
    return (words[..., None] >> _SHIFTS.to(packed.device) & 7).flatten(-2).to(torch.int8).sub_(4)


def _unpack_int3_fake(packed: Tensor) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 3 * 8, dtype=torch.int8)


_SHIFTS = torch.arange(0, 24, 3, dtype=torch.int32)

# Dettmers et al., QLoRA, 2023: the 16 levels of NF4, in steps of 1/127, so that integer kernels can multiply them.
NF4 = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


def pack_nf4(codes: Tensor) -> Tensor:
    """What ``unpack_nf4`` makes levels of: codes, [..., n] of 0..15 with n even, as uint8 [..., n / 2]."""
    return pack_int4(codes.to(torch.int8) - 8)


def _unpack_nf4(packed: Tensor) -> Tensor:
    """uint8 [..., n / 2] as int8 [..., n]: the nibbles, in the order of ``unpack_int4``, each as its level of NF4."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return torch.tensor(NF4, dtype=torch.int8, device=packed.device)[codes.int()]


def _token_scale(x: Tensor, *, bits: int = 8) -> Tensor:
    """float32 [...] for x [..., n]: the step that each row is rounded in; never zero.

    With 8 bits it sends the largest magnitude to 127 or -127. With 4 bits it sends it, whatever its sign, to -8: the
    step has a sign, all sixteen numbers are used, and what is as large on the other side loses a step at most.
    """
    tiny = torch.finfo(torch.float32).tiny
    if bits == 8:
        return (x.abs().amax(-1).float() / 127).clamp_min(tiny)
    if bits != 4:
        raise ValueError(f"token_scale is for numbers of 8 or 4 bits, not {bits}")
    low, high = x.amin(-1).float(), x.amax(-1).float()
    step = torch.where(high > -low, high, low) / -8
    return torch.where(step.abs() < tiny, tiny, step)


def _token_scale_fake(x: Tensor, *, bits: int = 8) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


_GRAIN = "int? axis=None, int? group_size=None"
define(
    f"quantize(Tensor x, Tensor scale, Tensor? zero_point=None, *, {_GRAIN}, int low=-128, int high=127) -> Tensor",
    _quantize,
    _quantize_fake,
    differentiable=False,
)
define(
    f"dequantize(Tensor q, Tensor scale, Tensor? zero_point=None, *, {_GRAIN}, ScalarType dtype=float32) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
define("unpack_int4(Tensor packed) -> Tensor", _unpack_int4, _unpack_int4_fake, differentiable=False)
define("unpack_int3(Tensor packed) -> Tensor", _unpack_int3, _unpack_int3_fake, differentiable=False)
define("unpack_nf4(Tensor packed) -> Tensor", _unpack_nf4, _unpack_int4_fake, differentiable=False)
define("token_scale(Tensor x, *, int bits=8) -> Tensor", _token_scale, _token_scale_fake)
