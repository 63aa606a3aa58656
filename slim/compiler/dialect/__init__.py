"""The dialect a Program is written in: core ATen, ``aten.linear`` whole, and the few ``slim::`` ops below.

Each slim op is registered with torch.library with an eager reference (its meaning), a shape function, and autograd
through the reference. An op is here because a pass or a kernel reads it.
"""

from slim.compiler.dialect import attention, experts, norm, quant, rope
from slim.compiler.dialect._register import reference_of

__all__ = ["attention", "experts", "norm", "quant", "reference_of", "rope"]
