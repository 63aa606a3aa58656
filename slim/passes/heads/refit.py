"""The output projection fitted anew: what it did to the old heads, done as well as it can be to the new ones."""

from __future__ import annotations

import torch
from torch import Tensor

from slim.compiler.program import Program
from slim.compiler.statistics import SiteStatistics
from slim.passes.heads.find import Heads
from slim.passes.heads.layer import Made

_DAMPING = 0.01  # of the mean diagonal of the Gram matrix


def refit(program: Program, heads: Heads, original: Tensor, statistics: SiteStatistics) -> tuple[Made, float]:
    """(the new weight, and bias if there is one; the share of the old result's energy that it does not reproduce).

    Least squares over the calibration tokens, W' = W C_old,new (C_new,new)^-1, damped towards the weight that is
    there, which makes the old heads of the merged ones. A bias takes up the means.

    Args:
        original: the weight over the old heads, [m, n].
        statistics: of what enters the linear now, with its cross terms to what entered it before.
    """
    assert statistics.gram is not None
    assert statistics.cross is not None
    assert statistics.dense_gram is not None
    assert statistics.dense_mean is not None
    gram, cross, dense = (s.double() for s in (statistics.gram, statistics.cross, statistics.dense_gram))
    mean, dense_mean = statistics.mean.double(), statistics.dense_mean.double()
    old, start = original.double(), program.weights[heads.out_weight].double()
    if heads.out_bias is not None:
        gram, cross, dense = (
            gram - mean[:, None] * mean, cross - dense_mean[:, None] * mean, dense - dense_mean[:, None] * dense_mean,
        )  # fmt: skip
    damping = _DAMPING * float(gram.diagonal().mean())
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(damped, old @ cross + damping * start, left=False)
    weight = weight.to(program.weights.dtype(heads.out_weight))
    made = {heads.out_weight: weight}
    fitted = weight.double()
    if heads.out_bias is not None:
        bias = program.weights[heads.out_bias]
        made[heads.out_bias] = (bias.double() + old @ dense_mean - fitted @ mean).to(bias.dtype)
    energy = float(((old @ dense) * old).sum())
    missing = energy - 2 * float(((old @ cross) * fitted).sum()) + float(((fitted @ gram) * fitted).sum())
    return made, max(missing, 0.0) / energy if energy > 0.0 else 0.0
