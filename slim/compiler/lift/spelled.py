"""Calls that torch.export cannot take, or that are outside of the dialect, as calls that are in it.

They are exchanged as the model calls them, whoever captures it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SpelledOut(TorchFunctionMode):
    """While it is entered, what stands in ``_SPELLED`` is called instead of the functions that it stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _SPELLED.get(_name(func), func)(*args, **(kwargs or {}))


def _name(func: Any) -> str:
    """Of a function, a method of Tensor or an operator that a library has registered: ``transformers::attend``."""
    if isinstance(func, torch._ops.OpOverload):
        return func._schema.name
    if isinstance(func, torch._ops.OpOverloadPacket):
        return func._qualified_op_name
    return getattr(func, "__name__", "")


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A product and a sum: torch's own shape function for it refuses symbolic sizes."""
    return input * beta + torch.bmm(batch1, batch2) * alpha


def _grouped_mm(
    input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Rows [S,n] that are sorted by expert, times weight [E,n,m]; ``offs`` [E]: where the rows of each end."""
    if input.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None or out_dtype is not None:
        return torch._grouped_mm(input, weight, offs=offs, bias=bias, out_dtype=out_dtype)
    rows = torch.arange(input.shape[0], dtype=offs.dtype, device=offs.device)
    expert = torch.searchsorted(offs, rows, right=True)
    return torch.ops.slim.expert_linear(input, weight.transpose(1, 2), None, expert)


_SPELLED = {
    "baddbmm": _baddbmm,
    "_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
}
