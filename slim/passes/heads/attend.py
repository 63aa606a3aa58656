"""Attention as a function of what the linears of its queries, keys and values return, differentiable twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from slim.compiler.dialect import reference_of
from slim.compiler.program import Program
from slim.passes.heads.find import RESHAPES, Heads

_TO = torch.ops.aten._to_copy.default


@dataclass(frozen=True)
class Region:
    """What the graph does between the linears of q, k and v and the output projection.

    Attributes:
        linears: those of q, k and v. nodes: what is computed, in order.
        outside: what is read of the rest of the graph: tables of angles, masks, sizes.
    """

    heads: Heads
    linears: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]

    @classmethod
    def of(cls, heads: Heads) -> Region:
        """Of a layer that ``find_heads`` found."""
        linears = tuple(one.linear for one in (heads.q, heads.k, heads.v))
        inside = {heads.attention, *(node for one in (heads.q, heads.k, heads.v) for node in one.path)}
        node = heads.attention
        while (node := next(iter(node.users))) is not heads.out:
            inside.add(node)
        read = {source for node in inside for source in node.all_input_nodes}
        outside = sorted(node for node in read - inside - {*linears} if node.op != "get_attr")
        return cls(heads, linears, tuple(sorted(inside)), tuple(outside))

    @property
    def source(self) -> fx.Node:
        """The rows that all three linears read."""
        rows = self.linears[0].args[0]
        assert isinstance(rows, fx.Node)
        return rows

    @property
    def rows_out(self) -> fx.Node:
        """What the output projection reads."""
        rows = self.heads.out.args[0]
        assert isinstance(rows, fx.Node)
        return rows

    def run(self, program: Program, made: Sequence[Tensor], outside: Mapping[fx.Node, Any]) -> Tensor:
        """What the output projection reads, [..., k].

        Args:
            made: what the linears of q, k and v return, [..., each]. outside: the values of ``self.outside``.
        """
        values: dict[fx.Node, Any] = dict(outside) | dict(zip(self.linears, made, strict=True))

        def value(node: fx.Node) -> Any:
            found = program.weights[str(node.target)] if node.op == "get_attr" else values[node]
            return found.float() if isinstance(found, Tensor) and found.is_floating_point() else found

        with sdpa_kernel(SDPBackend.MATH):  # the one with second derivatives
            for node in self.nodes:
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                values[node] = _call(node.target, args, kwargs)
        found = values[self.nodes[-1]]
        assert isinstance(found, Tensor)
        return found


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    """The operation; in float32 whatever the model computes in."""
    if target in RESHAPES:  # gradients need not lie in memory as values do
        return args[0].reshape(args[1])
    if target is _TO and args[0].is_floating_point():
        return args[0]
    return (reference_of(target) or target)(*args, **kwargs)
