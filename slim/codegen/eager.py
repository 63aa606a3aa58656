"""The target "eager": the Program's own graph as one Python function over PyTorch, with nothing compiled.

Its meaning is the Program's. Where the dialect says *what* and a machine cares *how*, it does what is faster:
quantised weights are read as they are stored, what all layers share is computed once, and operations are called
directly, past the dispatcher.
"""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slim.codegen import eager_ops
from slim.codegen.executables import Ends, Feedback
from slim.codegen.regions.provenance import Stage, program_names
from slim.compiler.program import Program
from slim.compiler.report import Form
from slim.compiler.rules import argument
from slim.compiler.uses import DEQUANTIZE, EMBEDDING, EXPERTS, LINEAR, RESTORING, UNPACKS

aten, slim = torch.ops.aten, torch.ops.slim


_COMPUTES = "computes"  # key of meta: the names of the Program's nodes that a call computes


class EagerExecutable:
    """A Program as one Python function.

    Attributes:
        code: ``forward.py``, the function as it runs.
        form: nothing is generated: its operations are PyTorch's.
        stages: the calls of that function, one each.
    """

    form = Form()

    def __init__(self, program: Program) -> None:
        program.weights.materialise()
        graph = lower(program)
        self.stages: Sequence[Stage] = [_stage(node) for node in graph.nodes if node.op == "call_function"]
        self._weights = _flatten_weights(graph, program)
        source = graph.python_code("self")
        self.code = {"forward.py": source.src}
        self._forward = _load(source.src, source.globals)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        return self._forward(self._weights, *inputs)

    def bind(self, *inputs: Tensor) -> _Bound:
        """The same call, to be repeated."""
        return _Bound(self, list(inputs))


class _Bound:
    def __init__(self, executable: EagerExecutable, inputs: list[Tensor]) -> None:
        self._executable = executable
        self._inputs = inputs

    def set(self, index: int, value: Tensor) -> None:
        self._inputs[index] = value

    def __call__(self) -> tuple[Any, ...]:
        return self._executable(*self._inputs)

    def greedy(self, feedback: Feedback, mask: Tensor | None, ends: Ends) -> None:
        """There is no such loop: every step is Python's."""


def _stage(node: fx.Node) -> Stage:
    """A call of the function, and the Program's nodes that it stands for."""
    read = [str(source.target) if source.op == "get_attr" else source.name for source in node.all_input_nodes]
    weights = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    text = f'torch {_spelt(node.target)}: {" ".join(read)} -> {node.name}  # the target "eager" generates no code'
    return Stage(text, node.meta.get(_COMPUTES, ()), tuple(weights), ())


def _spelt(target: Any) -> str:
    """aten.embedding.default, torch.reshape, torch.nn.functional.linear, slim.codegen.eager_ops.int8_linear."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = target.__module__ or "torch"  # PyTorch's own bindings know no module, or a private one
    return f"{module.replace('torch._C._nn', 'torch.nn.functional')}.{target.__name__}"


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

# The same functions by PyTorch's own bindings: a call of an ATen overload from Python costs twice as much.
_DIRECT: dict[Any, Any] = {
    aten.linear.default: F.linear,
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.reshape.default: torch.reshape,
    aten.transpose.int: torch.transpose,
    aten.silu.default: F.silu,
    aten.cat.default: torch.cat,
    slim.rms_norm.default: eager_ops.rms_norm,
    slim.layer_norm.default: eager_ops.layer_norm,
    slim.rope_table.default: eager_ops.rope_table,
    slim.expert_linear.default: eager_ops.expert_linear,
}

# What reads a quantised weight as it is stored: which argument that is, how many arguments matter (a table's padding
# index is for training), and the function by the weight's grain.
_READERS: dict[Any, tuple[int, int]] = {LINEAR: (1, 3), EMBEDDING: (0, 2), EXPERTS: (1, 4)}
_PER_ROW: dict[Any, Any] = {
    LINEAR: eager_ops.int8_linear,
    EMBEDDING: eager_ops.int8_embedding,
    EXPERTS: eager_ops.int8_expert_linear,
}
_GROUPED: dict[Any, Any] = {
    LINEAR: eager_ops.grouped_linear,
    EMBEDDING: eager_ops.grouped_embedding,
    EXPERTS: eager_ops.grouped_expert_linear,
}


def lower(program: Program) -> fx.Graph:
    """The Program's graph over the functions of ``eager_ops`` and PyTorch."""
    copy = program.copy()
    lowering = _Lowering(copy.graph)
    for node in copy.nodes():
        node.meta[_COMPUTES] = tuple(program_names(node))
    for node in list(copy.nodes()):
        lowering.visit(node)
    for node in reversed(list(copy.graph.nodes)):  # what the new nodes no longer read
        if not node.users and (node.op == "get_attr" or node.target in RESTORING):
            copy.graph.erase_node(node)
    return copy.graph


class _Lowering:
    """Rewrites nodes one by one, in order; remembers what later layers may share."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.shared: dict[Any, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        target = node.target
        if target in _READERS and self._quantised(node):
            return
        if target in (slim.attention.default, slim.cached_attention.default) and _is_plain(node):
            self._attention(node)
        elif target is slim.rope.default:
            self._rope(node)
        elif target in _DIRECT:
            node.target = _DIRECT[target]

    def _quantised(self, node: fx.Node) -> bool:
        """Lets ``node`` read its weight as it is stored, if that is quantised in a way that has a function."""
        place, count = _READERS[node.target]
        before, weight, after = node.args[:place], node.args[place], node.args[place + 1 : count]
        if _is_per_row(weight):
            functions = _PER_ROW
        elif _is_grouped(weight):
            functions = _GROUPED
        else:
            return False
        node.meta[_COMPUTES] += tuple(each.name for each in _restoring(weight))
        self._replace(node, functions[node.target], *before, *_stored(weight), *after)
        return True

    def _rope(self, node: fx.Node) -> None:
        """Angles are laid out once for all layers, so that a rotation is two products and a sum."""
        x, cos, sin = node.args
        interleaved = node.kwargs.get("interleaved", False)
        if not x.meta["val"].dtype == cos.meta["val"].dtype == torch.float32:  # type: ignore[union-attr]
            node.target = eager_ops.rope  # narrow types round at every step, and the Program says where
            return
        wide = self._share(node, eager_ops.widen_angles, cos, sin, interleaved)
        self._replace(node, eager_ops.rotate, x, wide, interleaved)

    def _attention(self, node: fx.Node) -> None:
        """Which keys are seen is computed once for all layers that look alike."""
        q, k, v, mask, window = (argument(node, name) for name in ("q", "k", "v", "key_mask", "window"))
        causal = argument(node, "causal")
        tail = [argument(node, name) for name in ("sinks", "slopes", "scale", "softcap")]
        if node.target is slim.attention.default:
            seen = self._share(node, eager_ops.seen_keys, mask, causal, window, sizes=(q, k))
            bias = argument(node, "bias")
            self._replace(node, eager_ops.attention, seen, q, k, v, bias, *tail, causal)
        else:
            start = argument(node, "start")
            seen = self._share(node, eager_ops.seen_cached_keys, mask, start, window, sizes=(q,))
            caches = [argument(node, name) for name in ("k_cache", "v_cache", "k_scale", "v_scale")]
            self._replace(node, eager_ops.cached_attention, seen, q, k, v, *caches, start, window, *tail)

    def _share(self, node: fx.Node, function: Any, *args: Any, sizes: tuple[fx.Node, ...] = ()) -> fx.Node:
        """``function(*sizes, *args)``, computed once for equal ``args`` and equal shapes of ``sizes``."""
        key = (function, args, tuple(str(size.meta["val"].shape[2]) for size in sizes))
        if key not in self.shared:
            with self.graph.inserting_before(node):
                self.shared[key] = self.graph.call_function(function, (*sizes, *args))
        return self.shared[key]

    def _replace(self, node: fx.Node, function: Any, *args: Any) -> None:
        with self.graph.inserting_before(node):
            new = self.graph.call_function(function, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def _is_plain(node: fx.Node) -> bool:
    """Whether attention keeps everything, and counts nothing."""
    return argument(node, "pattern") is None and argument(node, "mass") is None


def _is_per_row(weight: Any) -> bool:
    """Whether ``weight`` is int8, or fp8, [..., m, n] with one scale for each row of n, and no zero points."""
    if not _is_quantised(weight) or argument(weight, "group_size") is not None:
        return False
    if argument(weight, "zero_point") is not None:
        return False
    q, scale = (value.meta["val"] for value in weight.args[:2])
    rows = q.shape[:-1]
    return bool(scale.shape == rows and argument(weight, "axis") == len(rows) - 1)


def _is_grouped(weight: Any) -> bool:
    """Whether ``weight`` is a tensor [..., m, n] of any number format with scales for groups along its rows."""
    if not _is_quantised(weight) or argument(weight, "group_size") is None:
        return False
    return bool(argument(weight, "axis") == len(weight.meta["val"].shape) - 1)


def _is_quantised(weight: Any) -> bool:
    return isinstance(weight, fx.Node) and weight.target is DEQUANTIZE


def _restoring(weight: Any) -> list[fx.Node]:
    """What makes a weight of stored numbers: ``slim.dequantize`` and what unpacks for it."""
    return [weight, *(node for node in weight.all_input_nodes if node.target in RESTORING)]


def _stored(weight: Any) -> tuple[Any, ...]:
    """(numbers, scale, the type they stand for) of a dequantised weight; by groups the numbers are as they are held,
    packed or not, and after the scale come the zero points and the format in which the numbers are packed."""
    (q, scale), dtype = weight.args[:2], weight.meta["val"].dtype
    if not _is_grouped(weight):
        return q, scale, dtype
    kind = next((kind for kind, unpack in UNPACKS.items() if q.target is unpack), None)
    return q if kind is None else q.args[0], scale, argument(weight, "zero_point"), kind, dtype
