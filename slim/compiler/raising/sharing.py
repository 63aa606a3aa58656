"""Common subexpressions: two nodes that compute the same of the same are one."""

from __future__ import annotations

from typing import Any

from torch import fx

from slim.compiler.program import Program


def share_equal(program: Program) -> None:
    """Replaces every operation by the first equal one before it; operations with effects stay."""
    seen: dict[Any, fx.Node] = {}
    for node in list(program.graph.nodes):
        if node.op != "call_function" or getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first, propagate_meta=False)
    program.clean()


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in value.items())
    return (type(value).__name__, value)  # 1, 1.0 and True are different arguments
