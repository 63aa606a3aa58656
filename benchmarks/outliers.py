"""Plants outliers of activations in a model without changing its function.

Models of some billions of parameters have channels whose activations are a hundred times larger than the rest; small
ones do not, and what quantisation does about outliers cannot be seen on them. ``PlantOutliers`` makes them: at each
norm's output some channels grow by a factor, and the columns that read them shrink by it.

    slim.compile(model, passes=[PlantOutliers(60), SmoothQuant(), ...])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.passes_base import FLOAT_WEIGHTS, Context, Pass
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.scaling import scale_sites, settle


@dataclass(frozen=True)
class PlantOutliers(Pass):
    """Makes some channels at each norm's output ``factor`` times larger, and their readers' columns as much smaller.

    Args:
        factor: how much larger. share: of the channels; at least one is taken. seed: which ones.
    """

    factor: float = 60.0
    share: float = 0.01
    seed: int = 0

    lossless = True
    requires = frozenset({FLOAT_WEIGHTS})

    def run(self, program: Program, ctx: Context) -> Report:
        sites, skipped = scale_sites(program)
        report = Report(skipped=skipped)
        generator = torch.Generator().manual_seed(self.seed)
        for site in sites:
            if site.after_norm:
                site.apply(program, self._scale(site.size, generator))
                report.matched.append(site.name)
            else:
                report.skipped.append(Skip(site.name, "it is no norm"))
        settle(program)
        return report

    def _scale(self, size: int, generator: torch.Generator) -> Tensor:
        scale = torch.ones(size)
        chosen = torch.randperm(size, generator=generator)[: max(1, round(self.share * size))]
        scale[chosen] = 1 / self.factor
        return scale
