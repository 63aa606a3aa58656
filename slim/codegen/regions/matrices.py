"""Weights of products: which are read as they are stored, and in which format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from slim.codegen.regions.products import Matrix
from slim.codegen.regions.views import Buffer, same
from slim.compiler.rules import argument
from slim.compiler.uses import DEQUANTIZE, UNPACKS

if TYPE_CHECKING:
    from slim.codegen.regions.lower import Lowering

FLOAT_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_PLAIN = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
_WITH_ZEROS = ("int4", "int3")
_ZEROS = ("int8", "int4", "int3")
_STEPS = {"int3": 32}  # groups are multiples of this; of 16 elsewhere


def matrix(lowering: Lowering, weight: Any) -> Matrix:
    """The weight that ``weight`` reads, in the format that it is stored in where there is a kernel for that."""
    shape = lowering.shape(weight)
    m, n = int(shape[-2]), int(shape[-1])
    if weight.op == "get_attr":
        name = str(weight.target)
        kind = FLOAT_FORMATS.get(lowering.program.weights.dtype(name))
        if kind in lowering.wants.formats:
            return Matrix(kind, lowering.weight(name), None, m, n)
    quantized = _quantized(lowering, weight, m, n) if weight.target is DEQUANTIZE else None
    if quantized is not None:
        return quantized
    view = lowering.view(weight)
    if not view.is_contiguous or not same(view.offset, 0) or view.buffer.dtype not in FLOAT_FORMATS:
        view = lowering.store(lowering.value(weight), fresh=True)
    return Matrix(FLOAT_FORMATS[view.buffer.dtype], view.buffer, None, m, n)


def step_of_groups(kind: str) -> int:
    """What the groups of a format, and of what shares rows with it, are multiples of."""
    return _STEPS.get(kind, 16)


def _quantized(lowering: Lowering, node: fx.Node, m: int, n: int) -> Matrix | None:
    """A quantised weight with one scale a row, or by groups of a row; of int4 and int3 with zero points too."""
    numbers, scale, zero = _stored(node.args[0]), node.args[1], argument(node, "zero_point")
    zeros = ("", "") if zero is None else _stored(zero)
    if numbers is None or zeros is None or not isinstance(scale, fx.Node) or scale.op != "get_attr":
        return None
    (kind, name), (zero_format, zero_name) = numbers, zeros
    group = _group(lowering, node, kind, n, bool(zero_format))
    if group is None or kind not in lowering.wants.formats:
        return None
    if zero_format and (kind not in _WITH_ZEROS or zero_format not in _ZEROS):
        return None
    scale_name = str(scale.target)
    if kind == "fp8" and lowering.wants.packed:
        held = lowering.weight(scale_name, packing="f32")
        return Matrix(kind, lowering.weight(name), held, m, n, group)
    if not lowering.wants.packed:
        points: Buffer | None = lowering.weight(zero_name) if zero_format else None
        data, held = lowering.weight(name), lowering.weight(scale_name)
        return Matrix(kind, data, held, m, n, group, points, zero_format)
    if group:
        packing = (kind, group, scale_name, zero_name, zero_format)
        return Matrix(kind, lowering.weight(name, packing), None, m, n, group, None, zero_format)
    held = lowering.weight(scale_name, packing="f32")
    return Matrix(kind, lowering.weight(name, (kind, 0, None, "", "")), held, m, n)


def _stored(value: Any) -> tuple[str, str] | None:
    """(number format, name of the weight) of numbers that are held as a weight."""
    for kind, unpack in UNPACKS.items():
        if value.target is unpack:
            return (kind, str(value.args[0].target)) if value.args[0].op == "get_attr" else None
    plain = _PLAIN.get(value.meta["val"].dtype) if value.op == "get_attr" else None
    return None if plain is None else (plain, str(value.target))


def _group(lowering: Lowering, node: fx.Node, kind: str, n: int, zeros: bool) -> int | None:
    """Numbers of a row that share a scale, 0 for all of them; None for a grain that kernels do not read.

    With zero points a whole row is a group like others: its scales [m] lie as [m, 1] would.
    """
    axis, group = argument(node, "axis"), argument(node, "group_size")
    rows = lowering.shape(node)[:-1]
    if group is None:
        by_row = axis == len(rows) - 1 and lowering.shape(node.args[1]) == rows  # type: ignore[arg-type]
        if not by_row or not zeros:
            return 0 if by_row else None
        group, axis = n, len(rows)
    fits = axis == len(rows) and n % group == 0 and group % step_of_groups(kind) == 0
    return int(group) if fits else None


__all__ = ["FLOAT_FORMATS", "matrix", "step_of_groups"]
