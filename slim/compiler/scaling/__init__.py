"""Scale moves: dividing the channels of a value by a scale, and multiplying what reads them by it, exactly.

>>> sites, skips = scale_sites(program)
>>> for site in sites:
...     site.apply(program, torch.rand(site.size) + 0.5)  # the function stays the same
>>> settle(program)
"""

from slim.compiler.scaling.scaled import by_rows, scale_weight, settle
from slim.compiler.scaling.sites import Reader, ScaleSite, scale_sites

__all__ = ["Reader", "ScaleSite", "by_rows", "scale_sites", "scale_weight", "settle"]
