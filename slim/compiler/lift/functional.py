"""Which exported graphs are functions as they stand, and how calls are spelled that may return their own argument.

torch.export keeps the calls that a model makes; ``run_decompositions`` turns calls that write into their arguments into
functions, by tracing the graph anew, which takes as long as the export did. Most models write into nothing. Of their
calls, only composite ones that may return a view of an argument would be spelled otherwise; the frequent ones are here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx

from slim.compiler.types import SIZE_OPS

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
_KEPT = aten.contiguous.default  # the rules know it as it is


def is_functional(graph: fx.Graph) -> bool:
    """Whether no call writes into its arguments, and every call that may return one of them is spelled here."""
    return all(node.op in ("placeholder", "output") or _is_function(node) for node in graph.nodes)


def _is_function(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or target is operator.getitem or target in SIZE_OPS:
        return node.op == "call_function"
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return target is _KEPT or not _may_alias(target) or spelled(node) is not None


@cache
def _may_alias(op: torch._ops.OpOverload) -> bool:
    """Whether torch takes the call apart because its schema does not say if the result is a view of an argument."""
    if torch.Tag.maybe_aliasing_or_mutating in op.tags:
        return True
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return composite and any(argument.alias_info is not None for argument in op._schema.arguments)


Spelled = tuple[Callable[..., Any] | None, tuple[Any, ...], dict[str, Any]]  # no operation: the first argument itself


def spelled(node: fx.Node) -> Spelled | None:
    """A call that may return its argument as one that never does; None where the call stays, or is not known."""
    if node.target in _CASTS:
        return _cast(node)
    if node.kwargs:  # torch.export gives the arguments of the following by position
        return None
    if node.target is aten.dropout.default:
        return None if node.args[2] else (None, node.args, {})
    if node.target is aten.chunk.default:
        return _chunk(node)
    if node.target is aten.reshape.default:
        return _reshape(node)
    return None


def _cast(node: fx.Node) -> Spelled | None:
    source, result = (n.meta["val"] for n in (node.args[0], node))  # type: ignore[union-attr]
    if not isinstance(source, Tensor) or source.device != result.device or source.layout != result.layout:
        return None
    if source.dtype == result.dtype:
        return None, node.args, {}
    return aten._to_copy.default, node.args[:1], {"dtype": result.dtype}


def _chunk(node: fx.Node) -> Spelled | None:
    x, chunks, dim = cast(tuple[Any, Any, Any], (*node.args, 0)[:3])
    size = x.meta["val"].shape[dim]
    if isinstance(size, torch.SymInt):
        return None
    return aten.split.Tensor, (x, -(-size // chunks), dim), {}


def _reshape(node: fx.Node) -> Spelled | None:
    """With the size that -1 stands for, where that is a number."""
    x: Any = node.args[0]
    shape: Any = node.args[1]
    sizes = [n if size == -1 else size for size, n in zip(shape, node.meta["val"].shape, strict=True)]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    return aten.reshape.default, (x, sizes), {}
