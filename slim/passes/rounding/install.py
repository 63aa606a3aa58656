"""Puts what rounding made into a Program: numbers and scales for a weight, rounded rows, what is added beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program
from slim.compiler.uses import DEQUANTIZE, LINEAR, UNPACKS
from slim.passes.rounding.grid import Grid, Stored

aten, slim = torch.ops.aten, torch.ops.slim


def install_weight(program: Program, node: fx.Node, grid: Grid, stored: Stored) -> fx.Node:
    """Keeps ``stored`` instead of the weight that ``node`` reads, and puts the value it stands for before its readers.

    Numbers stay under the weight's name; scale and zero point are ``<name>_scale`` and ``<name>_zero``.

    Returns:
        The ``slim.dequantize`` node that all readers now read.
    """
    name = str(node.target)
    dtype = program.weights.dtype(name)
    readers = list(node.users)
    first = min(readers)  # fx orders nodes by their place in the graph
    for suffix, value in zip(("", "_scale", "_zero"), stored, strict=True):
        if value is not None:
            program.weights[f"{name}{suffix}"] = value
    node.meta["val"] = program.typer.value(node, program.weights)
    unpack = UNPACKS.get(grid.format)
    numbers = node if unpack is None else program.insert(first, unpack, node, like=first)
    grids = [program.weight_node(f"{name}_scale")]
    if stored.zero_point is not None:
        zero = program.weight_node(f"{name}_zero")
        packed = unpack is not None and stored.zero_point.dtype == torch.uint8
        grids.append(program.insert(first, unpack, zero, like=first) if packed and unpack else zero)
    grain: dict[str, Any] = dict(axis=grids[0].meta["val"].dim() - 1, group_size=grid.group_size or None)
    restored = program.insert(first, DEQUANTIZE, numbers, *grids, like=first, **grain, dtype=dtype)
    for reader in readers:
        reader.replace_input_with(node, restored)
    return restored


def round_rows(
    program: Program, value: fx.Node, linears: Sequence[fx.Node], keep: str | None, step: str | None
) -> None:
    """Lets ``linears`` read ``value`` rounded to int8.

    Args:
        keep: a weight [n] of ones and zeros: columns that are set to zero first.
        step: a weight []: one scale for all rows; None finds one for each as it runs.
    """
    first = min(linears)
    dtype = value.meta["val"].dtype
    if keep is not None:
        value = program.insert(first, aten.mul.Tensor, value, program.weight_node(keep), like=first)
    if step is None:
        scale = program.insert(first, slim.token_scale.default, value, like=first)
        grain: dict[str, Any] = {"axis": value.meta["val"].dim() - 2}
    else:
        scale, grain = program.weight_node(step), {}
    q = program.insert(first, slim.quantize.default, value, scale, like=first, **grain)
    rounded = program.insert(first, DEQUANTIZE, q, scale, like=first, **grain, dtype=dtype)
    for linear in linears:
        linear.update_arg(0, rounded)


def add_columns(program: Program, linear: fx.Node, columns: str, kept: str) -> None:
    """Adds the product of some columns of what enters ``linear`` with a weight of their own.

    Args:
        columns: the weight, int64 [k], that lists them. kept: the weight [m, k].
    """
    at = program.weight_node(columns)
    picked = program.insert(linear.next, aten.index_select.default, linear.args[0], -1, at, like=linear)
    _add(program, linear, program.insert(picked.next, LINEAR, picked, program.weight_node(kept), like=linear))


def add_low_rank(program: Program, linear: fx.Node, inner: str, outer: str) -> None:
    """Adds ``outer (inner x)`` to what ``linear`` makes of x; inner is [r, n], outer [m, r]."""
    latent = program.insert(linear.next, LINEAR, linear.args[0], program.weight_node(inner), like=linear)
    _add(program, linear, program.insert(latent.next, LINEAR, latent, program.weight_node(outer), like=linear))


def _add(program: Program, linear: fx.Node, product: fx.Node) -> None:
    readers = [reader for reader in linear.users if reader is not product]
    total = program.insert(product.next, aten.add.Tensor, linear, product, like=linear)
    for reader in readers:
        reader.replace_input_with(linear, total)
