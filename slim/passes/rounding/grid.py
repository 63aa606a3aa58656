"""The numbers a weight may be rounded to, and a weight that has been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slim import errors
from slim.compiler.dialect.quant import NF4, pack_int3, pack_int4, pack_nf4

Format = Literal["int8", "int4", "int3", "nf4", "fp8"]

_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "int3": (-4, 3), "nf4": (-127, 127), "fp8": (-448, 448)}
_WITH_ZERO_POINTS = frozenset({"int4", "int3"})
_IN_ONE_WORD = {"int4": 2, "nf4": 2, "int3": 8}  # numbers that are packed together
_SMALLEST = 2.0**-24  # of float16


class Scales(NamedTuple):
    """What numbers are multiplied with: ``w = (number - zero) * scale``, one of each for every group.

    Attributes:
        scale: [m, k], k groups a row, in the type it is stored in; never zero, and negative where that is better.
        zero: float32 [m, k] of integers that the grid has; None where zero is zero.
    """

    scale: Tensor
    zero: Tensor | None = None

    def __getitem__(self, rows: slice) -> Scales:  # type: ignore[override]
        return Scales(self.scale[rows], None if self.zero is None else self.zero[rows])


@dataclass(frozen=True)
class Grid:
    """A number format and how finely it is scaled.

    Args:
        format: int8 has -127..127, int4 -8..7, int3 -4..3, nf4 16 levels of a normal distribution, fp8 is E4M3.
        group_size: numbers of a row that share a scale; 0 is one scale a row.
        symmetric: zero is the number zero. Otherwise every group has a zero point of its own (int4 and int3).

    Example:
        >>> Grid("int4", group_size=32).bits(width=4096)
        4.5
    """

    format: Format
    group_size: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not self.symmetric and self.format not in _WITH_ZERO_POINTS:
            raise errors.BadInput(argument="symmetric", reason=f"{self.format} has no zero point")
        if self.group_size < 0:
            raise errors.BadInput(argument="group_size", reason=f"a group of {self.group_size} holds no number")

    @property
    def low(self) -> int:
        return _RANGES[self.format][0]

    @property
    def high(self) -> int:
        return _RANGES[self.format][1]

    @property
    def signs_differ(self) -> bool:
        """Whether a group and its negative round differently, so that a negative scale may be the better one."""
        return self.symmetric and (self.low != -self.high or self.format == "nf4")

    @property
    def number_type(self) -> torch.dtype:
        """What numbers are held in before they are packed."""
        return torch.float8_e4m3fn if self.format == "fp8" else torch.int8

    def groups(self, width: int) -> int:
        """How many groups a row of ``width`` numbers has.

        Raises:
            BadInput: where they do not divide it, or cannot be packed.
        """
        group = self.group_size or max(width, 1)
        if width % group:
            raise errors.BadInput(argument="group_size", reason=f"rows of {width} do not divide into groups of {group}")
        together = _IN_ONE_WORD.get(self.format, 1)
        if width % together:
            reason = f"{self.format} packs {together} numbers together, and a row has {width}"
            raise errors.BadInput(argument="format", reason=reason)
        return width // group

    def bits(self, width: int) -> float:
        """Bits a weight of rows of ``width``, scales and zero points included."""
        number = {"int3": 3, "int4": 4, "nf4": 4}.get(self.format, 8)
        scale = 16 if self.group_size else 32
        return number + (scale + (0 if self.symmetric else number)) * self.groups(width) / width

    def nearest(self, ratio: Tensor, zero: Tensor | None = None) -> Tensor:
        """The multiple of the scale nearest to ``ratio``, float32: what ``number - zero`` is for a weight / scale."""
        if self.format == "nf4":
            return _levels(ratio.device)[_codes(ratio)]
        if self.format == "fp8":
            return ratio.clamp(self.low, self.high).to(torch.float8_e4m3fn).float()
        if zero is None:
            return ratio.round().clamp_(self.low, self.high)
        return (ratio.round() + zero).clamp_(self.low, self.high) - zero

    def numbers(self, steps: Tensor, zero: Tensor | None = None) -> Tensor:
        """What is stored for ``steps`` that ``nearest`` gave: int8, codes of 0..15 (nf4) or float8."""
        if self.format == "nf4":
            return _codes(steps).to(torch.int8)
        if self.format == "fp8":
            return steps.to(torch.float8_e4m3fn)
        return (steps if zero is None else steps + zero).to(torch.int8)

    def scale_type(self, largest: float) -> torch.dtype:
        """What scales are stored in where the largest magnitude of a weight is ``largest``.

        float32 by row. By groups float16, if the largest scale is a normal number of it: then all are off by 2^-11 of
        that at most.
        """
        scale = largest / min(-self.low, self.high)
        limits = torch.finfo(torch.float16)
        fits = limits.tiny <= scale <= limits.max / 2 or scale == 0  # a search may double it
        return torch.float16 if self.group_size and fits else torch.float32


class Stored(NamedTuple):
    """Tensors as they go into a file; numbers and zero point are uint8 where they are packed."""

    numbers: Tensor
    scale: Tensor
    zero_point: Tensor | None


class Rounded(NamedTuple):
    """A weight [..., n] as numbers of a grid.

    Attributes:
        grid: what the numbers mean.
        numbers: [..., n]: int8 (int8, int4, int3), codes of 0..15 as int8 (nf4) or float8_e4m3fn (fp8).
        scale: [...] float32 by row; [..., n / group_size] float16 or float32 by groups.
        zero_point: int8 of scale's shape; None where the grid is symmetric.
    """

    grid: Grid
    numbers: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

    def packed(self) -> Stored:
        """The tensors to store: what ``UNPACKS[format]`` unpacks, and a zero point packed likewise if it can be."""
        pack = {"int4": pack_int4, "int3": pack_int3, "nf4": pack_nf4}.get(self.grid.format)
        if pack is None:
            return Stored(self.numbers, self.scale, self.zero_point)
        zero = self.zero_point
        if zero is not None and zero.shape[-1] % _IN_ONE_WORD[self.grid.format] == 0:
            zero = pack(zero)
        return Stored(pack(self.numbers), self.scale, zero)

    def restored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the numbers stand for, as ``slim.dequantize`` computes it."""
        steps = self.numbers
        if self.grid.format == "nf4":
            steps = _levels(steps.device).to(torch.int8)[steps.int()]
        return torch.ops.slim.dequantize(
            steps,
            self.scale,
            self.zero_point,
            axis=self.scale.dim() - 1,
            group_size=self.grid.group_size or None,
            dtype=dtype,
        )


def spread(grouped: Tensor, width: int) -> Tensor:
    """[m, k] as float32 [m, width]: each group's value at each of its numbers."""
    return grouped.float().repeat_interleave(width // grouped.shape[-1], -1)


def stored_scale(scale: Tensor, kept: torch.dtype) -> Tensor:
    """``scale`` as it is stored: rounded to ``kept``, finite and never zero."""
    limits = torch.finfo(kept)
    smallest = _SMALLEST if kept == torch.float16 else limits.tiny
    return torch.where(scale.abs() < smallest, smallest, scale).clamp(-limits.max, limits.max).to(kept)


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def _codes(ratio: Tensor) -> Tensor:
    """Index of the NF4 level nearest to each number."""
    levels = _levels(ratio.device)
    return torch.bucketize(ratio.contiguous(), (levels[1:] + levels[:-1]) / 2)
