"""W8A8 as the IR says it, round to nearest, by no pass of slim: what migration alone is measured with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slim.compiler.passes_base import Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report
from slim.compiler.uses import EXPERTS, LINEAR
from slim.passes.quantize import quantize_weight

slim = torch.ops.slim


@dataclass(frozen=True)
class RoundToInt8(Pass):
    """Weights to int8 by row, and what enters each linear to int8 by token."""

    activations: bool = True

    def run(self, program: Program, ctx: Context) -> Report:
        report = Report()
        for linear in list(program.nodes(LINEAR, EXPERTS)):
            x, weight = linear.args[:2]
            if self.activations:
                axis = x.meta["val"].dim() - 2
                scale = program.insert(linear, slim.token_scale.default, x, like=linear)
                q = program.insert(linear, slim.quantize.default, x, scale, axis=axis, like=linear)
                dtype = x.meta["val"].dtype
                rounded = program.insert(linear, slim.dequantize.default, q, scale, axis=axis, dtype=dtype, like=linear)
                linear.args = (rounded, *linear.args[1:])
            if weight.op == "get_attr":
                report.matched.append(str(weight.target))
                quantize_weight(program, weight)
        return report
