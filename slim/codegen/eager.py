"""The target "eager": the Program's own graph as one Python function over PyTorch, with nothing compiled.

Its meaning is the Program's. What it does differently is where the dialect says *what* and a machine cares *how*:
quantised weights are read as they are stored, and no float copy of them is kept.
"""

from __future__ import annotations

import linecache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slim.compiler.program import Program

aten, slim = torch.ops.aten, torch.ops.slim


class EagerExecutable:
    """A Program as one Python function.

    Attributes:
        code: ``forward.py``, the function as it runs.
    """

    def __init__(self, program: Program) -> None:
        program.weights.materialise()
        graph = lower(program)
        self._weights = _flatten_weights(graph, program)
        source = graph.python_code("self")
        self.code = {"forward.py": source.src}
        self._forward = _load(source.src, source.globals)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        return self._forward(self._weights, *inputs)


def _flatten_weights(graph: fx.Graph, program: Program) -> SimpleNamespace:
    """Every weight as one attribute of one object: a dotted name would be a chain of lookups in each call."""
    held = SimpleNamespace()
    for node in graph.find_nodes(op="get_attr"):
        setattr(held, node.name, program.weights[str(node.target)])
        node.target = node.name
    return held


def _load(source: str, names: dict[str, Any]) -> Any:
    file = f"<slim eager {id(names):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # tracebacks show its lines
    exec(compile(source, file, "exec"), names)
    return names["forward"]


# -- lowering ----------------------------------------------------------------------------------------------------------


def lower(program: Program) -> fx.Graph:
    """A copy of the Program's graph in which whatever reads a quantised weight reads its integers."""
    graph = program.copy().graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            _lower_node(graph, node)
    for node in reversed(list(graph.nodes)):  # what the rewritten nodes left behind; effects have users or stay
        if not node.users and (node.op == "get_attr" or node.target is slim.dequantize.default):
            graph.erase_node(node)
    return graph


def _lower_node(graph: fx.Graph, node: fx.Node) -> None:
    if node.target is aten.linear.default and _per_row(node.args[1]):
        x, weight, bias = (*node.args, None)[:3]
        _replace(graph, node, int8_linear, x, *_stored(weight), bias)
    elif node.target is aten.embedding.default and _per_row(node.args[0]):
        _replace(graph, node, int8_embedding, *_stored(node.args[0]), node.args[1])
    elif node.target is slim.expert_linear.default and _per_row(node.args[1]):
        x, weight, bias, expert = node.args
        _replace(graph, node, int8_expert_linear, x, *_stored(weight), bias, expert)


def _per_row(weight: Any) -> bool:
    """Whether ``weight`` is an int8 tensor [..., m, n] with one scale for each row of n."""
    if not isinstance(weight, fx.Node) or weight.target is not slim.dequantize.default:
        return False
    q, scale, zero_point = (*weight.args, None)[:3]
    rows = q.meta["val"].shape[:-1]
    axis = weight.kwargs.get("axis")
    plain = zero_point is None and weight.kwargs.get("group_size") is None
    return bool(plain and scale.meta["val"].shape == rows and axis == len(rows) - 1)


def _stored(weight: fx.Node) -> tuple[Any, Any, torch.dtype]:
    return weight.args[0], weight.args[1], weight.meta["val"].dtype


def _replace(graph: fx.Graph, node: fx.Node, function: Any, *args: Any) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


# -- quantised operations ----------------------------------------------------------------------------------------------

# Rows of int8 are widened a block at a time, so that the float copy stays in the cache: measured on AVX2, 512 KiB is
# best for a few tokens (half the time of widening the whole weight), 4 MiB where the product dominates.
_FEW_TOKENS = 8
_SMALL_BLOCK, _LARGE_BLOCK = 1 << 17, 1 << 20


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """x (q * scale)^T + bias for x [..., n], q int8 [m, n], scale [m]; the scale is applied to the product."""
    rows = x.reshape(-1, x.shape[-1])
    if dtype == torch.bfloat16 and x.device.type == "cpu":  # torch has a kernel here, faster than bfloat16 itself
        ones = torch.ones(q.shape[0], dtype=dtype)  # a scale rounded to bfloat16 would bias its whole row
        y = (torch._weight_int8pack_mm(rows.contiguous(), q, ones) * scale).to(dtype)
    elif dtype == torch.float32:
        y = _widened_product(rows, q).mul_(scale)
    else:
        y = F.linear(rows, (q.float() * scale[:, None]).to(dtype))
    y = y if bias is None else y + bias
    return y.view(*x.shape[:-1], q.shape[0])


def _widened_product(rows: Tensor, q: Tensor) -> Tensor:
    elements = _SMALL_BLOCK if rows.shape[0] <= _FEW_TOKENS else _LARGE_BLOCK
    block = max(1, elements // q.shape[1])
    if block >= q.shape[0]:
        return F.linear(rows, q.to(rows.dtype))
    return torch.cat([F.linear(rows, part.to(rows.dtype)) for part in q.split(block)], dim=-1)


def int8_embedding(q: Tensor, scale: Tensor, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Rows ``tokens`` of q * scale: only the rows that are asked for are widened."""
    return (F.embedding(tokens, q).float() * F.embedding(tokens, scale[:, None])).to(dtype)


def int8_expert_linear(
    x: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype, bias: Tensor | None, expert: Tensor
) -> Tensor:
    """``slim.expert_linear`` for q int8 [E, m, n] and scale [E, m]: only the experts that are asked for are read."""
    y = x.new_empty(x.shape[0], q.shape[1])
    for index in torch.unique(expert).tolist():
        rows = (expert == index).nonzero(as_tuple=True)[0]
        y[rows] = int8_linear(x[rows], q[index], scale[index], dtype, None if bias is None else bias[index])
    return y
