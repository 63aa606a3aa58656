"""Linears: which kernels a sweep over weights becomes, by the number of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slim.codegen.regions.pointwise import const, op
from slim.codegen.regions.products import Linear, Matrix, Source
from slim.codegen.regions.scalars import F32, Lane, Load, Scalar
from slim.codegen.regions.schedule import Norm, Pointwise
from slim.codegen.regions.views import Buffer
from slim.codegen.triton import loops  # noqa: F401  it writes the kernels that prepare rows
from slim.codegen.triton.dequantize import dequantize
from slim.codegen.triton.experts import experts
from slim.codegen.triton.kernel import Form, Kernel, Stage
from slim.codegen.triton.matvec import one_row
from slim.codegen.triton.rounding import round_rows
from slim.codegen.triton.sweep import Branch, Sweep
from slim.codegen.triton.tiles import few_rows, many_rows
from slim.codegen.triton.writer import WRITERS, Target, writes

_TILES = (16, 32, 64, 128)  # rows of one tile, where programs share the columns of the weight
_FEW = 256  # rows up to which they do: more make enough tiles, and pay for a copy of a quantised weight in their type
_EXPERT_ROWS = 64  # rows up to which each reads the matrices of its expert for itself
_COPIED = 1 << 27  # numbers that a copy of a weight may have
_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@writes(Linear)
def _linear(region: Linear, target: Target) -> Stage:
    """Kernels for one row, few rows and many."""
    sweeps = _sweeps(region, region.source)
    stage = Stage([], rows=math.prod(region.source.view.shape[:-1]))
    many = _Many(region, target, stage.temps)
    if region.source.expert is not None:
        stage.forms.append(Form([one_row(sweep, target) for sweep in sweeps], _EXPERT_ROWS))
        kernels, source = many.rows()
        for sweep in _sweeps(region, source):
            kernels += experts(sweep, target, stage.temps)
        stage.forms.append(Form(kernels))
        return stage
    limits = [stage.rows] if isinstance(stage.rows, int) else [1, *_TILES[:-1], _FEW, None]
    stage.forms += [_form(many, sweeps, rows) for rows in limits]
    return stage


def _form(many: _Many, sweeps: Sequence[Sweep], rows: int | None) -> Form:
    """The form for calls of up to ``rows`` rows."""
    if rows == 1:
        return Form([one_row(sweep, many.target) for sweep in sweeps], 1)
    if rows is None or rows > _FEW:
        return Form(many.kernels(), rows)
    kernels: list[Kernel] = []
    if rows > _TILES[0] or sweeps[0].source.is_rounded:  # each program would do it all again
        kernels, source = many.rows()
        sweeps = _sweeps(many.region, source)
    tile = next((most for most in _TILES if rows <= most), _TILES[-1])
    return Form([*kernels, *(few_rows(sweep, many.target, tile) for sweep in sweeps)], rows)


def _sweeps(region: Linear, source: Source) -> list[Sweep]:
    """The parts, those together whose weights one kernel can read: of one format, group and number of products."""
    found: dict[Any, list[Branch]] = {}
    for part in region.parts:
        matrices = tuple(product.matrix for product in part.products)
        first = matrices[0]
        types = [buffer.dtype if buffer is not None else None for buffer in (first.data, first.scale)]
        key = (first.format, first.group, first.zero_format, len(matrices), *types)
        found.setdefault(key, []).append(Branch(part, matrices))
    like = region.source.view.buffer.dtype
    if not like.is_floating_point:  # what made the rows has rounded them
        like = region.parts[0].products[0].node.meta["val"].dtype
    return [Sweep(region, source, tuple(branches), like) for branches in found.values()]


def _widened(sweep: Sweep) -> bool:
    """Whether many rows would read a copy of its weights in the type of the rows."""
    size = sum(matrix.m * matrix.n for branch in sweep.branches for matrix in branch.matrices)
    exact = sweep.is_integer and sweep.matrix.format == "int8" and not sweep.matrix.group
    return sweep.matrix.is_quantized and not exact and size <= _COPIED


@dataclass
class _Many:
    """Kernels for many rows: first those that make the rows, and copies of weights, once for all tiles."""

    region: Linear
    target: Target
    temps: list[Buffer]
    _rows: Source | None = None

    def kernels(self) -> list[Kernel]:
        kernels, source = self.rows()
        for sweep in _sweeps(self.region, source):
            if _widened(sweep):
                copies, sweep = self._copied(sweep)
                kernels += copies
            kernels.append(many_rows(sweep, self.target))
        return kernels

    def rows(self) -> tuple[list[Kernel], Source]:
        """The rows normalised, and rounded to int8, in memory of their own."""
        source = self.region.source
        if source.norm is None and (not source.is_rounded or source.view.buffer.dtype == torch.int8):
            return [], source
        view, new = source.view, self._prepared()
        if source.own_step:
            assert new.scale is not None
            return [round_rows(self.region, new.view, new.scale, self.target)], new
        if source.norm is None:
            region: Norm | Pointwise = Pointwise(self.region.node, new.view, _rounded(Load(view), source))
        else:
            region = replace(source.norm, x=Load(view), shape=view.shape, out=new.view)
            region.body = _rounded(Lane(region), source)
        stage = WRITERS[type(region)](region, self.target)
        return list(stage.forms[-1].kernels), new

    def _prepared(self) -> Source:
        """Where the rows go, and their steps if those are found on the way; the same for all forms."""
        if self._rows is None:
            source, name = self.region.source, self.region.node.name
            dtype = torch.int8 if source.is_rounded else source.view.buffer.dtype
            rows = Buffer("temp", f"{name}_rows", dtype, source.view.shape)
            steps = Buffer("temp", f"{name}_steps", torch.float32, source.view.shape[:-1])
            self.temps += [rows, steps] if source.own_step else [rows]
            self._rows = Source(rows.view(), None, source.expert, steps.view() if source.own_step else source.scale)
        return self._rows

    def _copied(self, sweep: Sweep) -> tuple[list[Kernel], Sweep]:
        kernels, branches = [], []
        for branch in sweep.branches:
            matrices = []
            for matrix in branch.matrices:
                held = Buffer("temp", f"{matrix.data.name}_wide", sweep.like, (matrix.m, matrix.n))
                self.temps.append(held)
                kernels.append(dequantize(self.region, matrix, held, self.target))
                matrices.append(Matrix(_FORMATS[sweep.like], held, None, matrix.m, matrix.n))
            branches.append(Branch(branch.part, tuple(matrices)))
        return kernels, replace(sweep, branches=tuple(branches))


def _rounded(x: Scalar, source: Source) -> Scalar:
    if source.scale is None:
        return x
    step = Load(source.scale.unsqueeze(len(source.scale.shape)).expand(source.view.shape))
    steps = op("round", op("div", x, step))
    return op("min", op("max", steps, const(-128.0, F32)), const(127.0, F32))
