"""Operations that move or copy rows and leave what is in them alone."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

# Where the last dimension keeps its size, as is checked, these leave it alone.
_MOVES_ROWS = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.slice.Tensor, aten.unsqueeze.default,
    aten.expand.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.alias.default,
    aten.repeat_interleave.self_int,
})  # fmt: skip


def leaves_rows_whole(value: fx.Node, user: fx.Node) -> bool:
    """Whether each row of ``user`` is one of ``value``, its first argument, perhaps in another float type."""
    if user.op != "call_function" or user.args[0] is not value:
        return False
    width = value.meta["val"].shape[-1]
    if user.target is aten.index.Tensor:
        picked = user.args[1]
        return isinstance(picked, (list, tuple)) and len(picked) < value.meta["val"].dim()
    out = user.meta["val"]
    return user.target in _MOVES_ROWS and out.dtype.is_floating_point and width > 1 and bool(out.shape[-1] == width)
