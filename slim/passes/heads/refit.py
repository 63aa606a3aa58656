"""The output projection fitted anew: what it did to the old heads, done as well as it can be to the new ones."""

from __future__ import annotations

from torch import Tensor

from slim.compiler.program import Program
from slim.compiler.statistics import SiteStatistics
from slim.compiler.statistics.paired import Paired
from slim.passes.heads.find import Heads
from slim.passes.heads.layer import Made


def refit(program: Program, heads: Heads, original: Tensor, statistics: SiteStatistics) -> tuple[Made, float]:
    """(the new weight, and bias if there is one; the share of the old result's energy that it does not reproduce).

    Least squares over the calibration tokens, W' = W C_old,new (C_new,new)^-1, damped towards the weight that is
    there, which makes the old heads of the merged ones. A bias takes up the means.

    Args:
        original: the weight over the old heads, [m, n].
        statistics: of what enters the linear now, with its cross terms to what entered it before.
    """
    paired = Paired.of(statistics, centred=heads.out_bias is not None)
    old, start = original.double(), program.weights[heads.out_weight].double()
    weight = paired.fit(old, start).to(program.weights.dtype(heads.out_weight))
    made, fitted = {heads.out_weight: weight}, weight.double()
    if heads.out_bias is not None:
        bias = program.weights[heads.out_bias]
        made[heads.out_bias] = (bias.double() + paired.shift(old, fitted)).to(bias.dtype)
    return made, paired.missing(old, fitted)
