"""The verifier: a Program is well formed, in the dialect, and every recorded type is the true one."""

from __future__ import annotations

from typing import Any

from torch import fx

from slim import errors
from slim.compiler.program import Program, where
from slim.compiler.types import not_in_dialect, show_type


def verify(program: Program, stage: str) -> None:
    """Raises VerificationFailed, with the node and the reason, where ``program`` is broken after ``stage``."""
    defined: set[fx.Node] = set()
    for node in program.graph.nodes:
        reason = _structure(program, node, defined) or _dialect(node) or _type(program, node)
        if reason:
            raise errors.VerificationFailed(stage=stage, node=where(node), reason=reason)
        defined.add(node)
    _outputs(program, stage)
    _layers(program, stage)


def _structure(program: Program, node: fx.Node, defined: set[fx.Node]) -> str | None:
    for argument in node.all_input_nodes:
        if argument not in defined:
            return f"it reads {argument.name}, which is not computed before it"
    if node.op == "get_attr" and node.target not in program.weights:
        return f"there is no weight {node.target!r}"
    if node.op == "placeholder" and node.target not in {value.name for value in program.inputs}:
        return f"the Program declares no input {node.target!r}"
    return None


def _dialect(node: fx.Node) -> str | None:
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if node.op != "call_function":
        return f"a {node.op} is not part of the dialect"
    return not_in_dialect(node.target)


def _type(program: Program, node: fx.Node) -> str | None:
    try:
        value = program.typer.value(node, program.weights)
    except Exception as error:  # a shape function may raise anything; all of it means the node is ill typed
        return f"its arguments do not fit: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    found, recorded = _shown(program, value), _shown(program, node.meta.get("val"))
    if found != recorded:
        return f"it is recorded as {recorded} but computes {found}"
    return None


def _shown(program: Program, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(program, v) for v in value)
    return "nothing" if value is None else show_type(value, program.dims)


def _outputs(program: Program, stage: str) -> None:
    outputs = program.graph.find_nodes(op="output")
    if len(outputs) != 1:
        raise errors.VerificationFailed(stage=stage, node="output", reason=f"there are {len(outputs)} outputs, not one")


def _layers(program: Program, stage: str) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in program.attention_nodes():
        layer = node.kwargs["layer"]
        if layer in seen:
            reason = f"layer {layer} has an attention node already: {seen[layer].name}"
            raise errors.VerificationFailed(stage=stage, node=where(node), reason=reason)
        seen[layer] = node
