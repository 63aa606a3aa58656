"""From a Program to regions.

Nodes are visited in order. What one computes stays a ``Value``, a scalar for each index, and grows with what reads it
until somebody needs it in memory: then one region is made, around the anchor that the scalar holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from slim import errors
from slim.codegen.regions import linears, pairs
from slim.codegen.regions.pointwise import builder, const
from slim.codegen.regions.products import Pair, Part, Product
from slim.codegen.regions.rounded import absorbed, readers
from slim.codegen.regions.scalars import (
    F32,
    I64,
    Const,
    Iota,
    Lane,
    Load,
    Scalar,
    SizeOf,
    Value,
    computed,
    expand,
    lanes,
    mark,
    rebuild,
    remap,
    walk,
)
from slim.codegen.regions.schedule import Foreign, Norm, Pointwise, Region, Schedule
from slim.codegen.regions.views import Buffer, Size, View, same
from slim.codegen.regions.wants import Wants
from slim.compiler.program import Program
from slim.compiler.rounded_kv import done_by_attention
from slim.compiler.types import expression
from slim.compiler.uses import DEQUANTIZE, LINEAR, stored_in

log = logging.getLogger(__name__)
aten = torch.ops.aten

Handler = Callable[["Lowering", fx.Node], Any]
HANDLERS: dict[Any, Handler] = {}


def handles(*targets: Any) -> Callable[[Handler], Handler]:
    """Registers the function that lowers nodes of ``targets``."""

    def register(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, function))
        return function

    return register


class Unsupported(Exception):
    """A node has no kernel; the text is the reason that the report gives."""


def lower(program: Program, wants: Wants | None = None) -> Schedule:
    """Cuts ``program`` into regions; what has no kernel becomes a ``Foreign`` region with the reason."""
    from slim.codegen.regions import attention, indexing, reductions, shapes  # noqa: F401  they register handlers

    return Lowering(program, wants or Wants()).run()


class Lowering:
    """The state of one lowering.

    Attributes:
        values: node -> what it is: a Value, a size, or a tuple of them.
        pivoted: linears in pivot storage, by the node that ends each.
    """

    def __init__(self, program: Program, wants: Wants) -> None:
        self.program = program
        self.wants = wants
        self.schedule = Schedule()
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(program.graph.nodes))
        self.inside = done_by_attention(program)  # nodes that attention makes up for
        self.pivoted = pairs.pivoted(program)
        joined = {nodes.both for nodes in self.pivoted.values()}  # what puts the columns in order makes up for it
        self.absorbed = absorbed(program, wants) | self.inside | joined
        self.writer: dict[Buffer, int] = {}  # buffer -> the region that wrote it last
        self._weights: dict[str, Buffer] = {}
        self._stored: dict[int, tuple[Scalar, View]] = {}  # id of a body -> that body, and where its numbers lie

    def run(self) -> Schedule:
        self._declare_inputs()
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "call_function" and node not in self.absorbed:
                self.values[node] = self._lowered(node)
            elif node.op == "output":
                self._outputs(node)
        return self.schedule

    # -- what a node is ------------------------------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        """What the tensor ``node`` computes."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return Value(Load(self.weight(str(node.target)).view()), *self.type(node))
        value = self.values[node]
        assert isinstance(value, Value), node
        return value

    def once(self, node: fx.Node) -> fx.Node:
        """``node``, lowered now where it was left to those who read it."""
        if node not in self.values:
            self.values[node] = self._lowered(node)
        return node

    def type(self, node: fx.Node) -> tuple[tuple[Size, ...], torch.dtype]:
        """(shape, dtype) that the Program says."""
        return self.shape(node), node.meta["val"].dtype

    def shape(self, node: fx.Node) -> tuple[Size, ...]:
        return tuple(self.size(size) for size in node.meta["val"].shape)

    def size(self, value: Any) -> Size:
        """A size, given as a node, a symbolic integer or a number."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, int) and not isinstance(value, torch.SymInt):
            return value
        size = expression(value, self.program.dims)
        return int(size) if size.is_Integer else size

    def weight(self, name: str, packing: Any = None) -> Buffer:
        """The buffer of a weight; a packed one is another buffer than the plain one."""
        key = name if packing is None else f"{name}|{packing}"
        if key not in self._weights:
            weights = self.program.weights
            buffer = Buffer("weight", name, weights.dtype(name), tuple(weights.shape(name)), packing)
            self._weights[key] = buffer
            self.schedule.weights.append(buffer)
        return self._weights[key]

    def _declare_inputs(self) -> None:
        for node in self.program.graph.find_nodes(op="placeholder"):
            shape, dtype = self.type(node)
            buffer = Buffer("input", str(node.target), dtype, shape)
            for dim, size in enumerate(shape):
                if not isinstance(size, int):
                    self.schedule.dims.setdefault(str(size), (len(self.schedule.inputs), dim))
            view = buffer.view()
            if self.wants.pitched and dtype == torch.bool and len(shape) == 2:
                pitch = sympy.Symbol(f"{buffer.name}_pitch", integer=True, positive=True)
                self.schedule.pitches[str(pitch)] = len(self.schedule.inputs)
                view = View(buffer, shape, (pitch, 1))
            self.schedule.inputs.append(buffer)
            self.values[node] = Value(Load(view), shape, dtype)

    # -- lowering a node -----------------------------------------------------------------------------------------------

    def _lowered(self, node: fx.Node) -> Any:
        if isinstance(node.meta["val"], (int, torch.SymInt)):
            return self.size(node)
        try:
            self._check_types(node)
            handler = HANDLERS.get(node.target) or _pointwise
            value = handler(self, node)
        except Unsupported as reason:
            return self.foreign(node, str(reason))
        if isinstance(value, Value):
            mark(value.body, node.name)
        return self._settled(node, value)

    def _check_types(self, node: fx.Node) -> None:
        """Kernels compute in float32, which is too little for what asks for more, and with real numbers."""
        values = [each.meta["val"] for each in (node, *node.all_input_nodes)]
        dtypes = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        if any(dtype.is_complex for dtype in dtypes):
            raise self._refused(f"kernels know no complex numbers, which {node} takes or gives")
        if torch.float64 in dtypes and node.target is not aten._to_copy.default:
            raise Unsupported("kernels compute in float32, and it is of float64")

    def _refused(self, reason: str) -> errors.UnsupportedModel:
        model = self.program.facts.architecture or "the model"
        return errors.UnsupportedModel(model=model, reason=f'{reason}; target="eager" has them')

    def _settled(self, node: fx.Node, value: Any) -> Any:
        """``value``, in memory if more than one node reads it and computing it twice would cost."""
        if not isinstance(value, Value) or _is_free(value.body) or len(self._readers(node)) < 2:
            return value
        if node.target is DEQUANTIZE and stored_in(node.args[0]):
            return value  # of a tied table the head reads what is stored, and a lookup the rows that it needs
        if isinstance(value.body, Lane) and isinstance(value.body.anchor, Norm) and self._only_linears(node):
            return value
        return Value(Load(self.store(value)), value.shape, value.dtype)

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read numbers of ``node`` and are not part of what attention does."""
        return [user for user in readers(node) if user not in self.inside]

    def _only_linears(self, node: fx.Node) -> bool:
        """Whether linears alone read ``node``, rounded or not."""
        reading = self._readers(node)
        return all(user in self.absorbed or (user.target is LINEAR and user.args[0] is node) for user in reading)

    # -- putting values into memory ------------------------------------------------------------------------------------

    def temp(self, shape: Sequence[Size], dtype: torch.dtype, name: str | None = None) -> Buffer:
        """New memory of the run's own."""
        return Buffer("temp", name or self.node.name, self.held(dtype), tuple(shape))

    def held(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which numbers of ``dtype`` lie between regions."""
        return F32 if dtype.is_floating_point and dtype != torch.float64 and self.wants.wide else dtype

    @property
    def floats(self) -> torch.dtype | None:
        """The only type of floats that kernels read between regions; None where they read any."""
        return F32 if self.wants.wide else None

    def view(self, node: Any) -> View:
        """``node`` in memory, strided as it comes."""
        return self.store(self.value(node))

    def rows(self, node: Any, dtype: torch.dtype | None = None) -> View:
        """``node`` in memory, its last dimension contiguous; as ``dtype`` where a kernel reads nothing else."""
        value = self.value(node)
        view = self.store(value)
        dense = same(view.strides[-1], 1) or same(view.shape[-1], 1)
        if dense and dtype in (None, view.buffer.dtype):
            return view
        return self.store(value, fresh=True)

    def store(self, value: Value, out: View | None = None, fresh: bool = False) -> View:
        """Makes the region that computes ``value``, into ``out`` or new memory; nothing where it lies in memory."""
        if out is None and not fresh:
            if isinstance(value.body, Load):
                return value.body.view
            _, held = self._stored.get(id(value.body), (None, None))  # a mask that every layer reads
            if held is not None and held.shape == tuple(value.shape):
                return held
        if out is None:
            out = self.temp(value.shape, value.dtype).view()
        self._stored.setdefault(id(value.body), (value.body, out))
        body = self._one_anchor(value.body, value.shape)
        anchors = lanes(body)
        if not anchors:
            self.emit(Pointwise(self.node, out, body))
        elif isinstance(anchors[0], Product):
            linears.emit(self, Part(tuple(anchors), body, out))
        elif isinstance(anchors[0], Pair):
            pairs.emit(self, anchors[0], body, out)
        else:
            anchors[0].body, anchors[0].out = body, out
            self.emit(anchors[0])
        return out

    def _one_anchor(self, body: Scalar, shape: Sequence[Size]) -> Scalar:
        """``body`` over lanes that one region can compute; the other anchors are stored first."""
        anchors = lanes(body)
        kept = linears.together(anchors)
        for anchor in anchors:
            if anchor not in kept:
                view = self.store(Value(Lane(anchor), anchor.shape, F32))
                held = view.reshape(shape)
                assert held is not None, "a new buffer is contiguous"
                body = _without(body, anchor, Load(held))
        return body

    def emit(self, region: Region) -> None:
        """Adds a region at the end."""
        for body in region.bodies():
            mark(body, self.node.name)
        for buffer in region.writes():
            self.writer[buffer] = len(self.schedule.regions)
        self.schedule.regions.append(region)

    def plain(self, value: Value) -> Value:
        """``value`` without lanes: stored if it has any, so that it can be read at any index."""
        return Value(Load(self.store(value)), value.shape, value.dtype) if lanes(value.body) else value

    def remapped(self, value: Value, shape: Sequence[Size], move: Callable[[Any], Any | None]) -> Value:
        """``value`` over another index space; stored first where that needs it."""
        value = self.plain(value)
        body = remap(value.body, move)
        if body is None:
            body = remap(Load(self.store(value, fresh=True)), move)
        assert body is not None
        return Value(body, tuple(shape), value.dtype)

    # -- what has no kernel, and the outputs ---------------------------------------------------------------------------

    def foreign(self, node: fx.Node, reason: str) -> Any:
        """Leaves ``node`` to PyTorch."""
        log.debug("%s runs through PyTorch: %s", node, reason)
        dtypes: dict[View, torch.dtype] = {}

        def place(argument: fx.Node) -> Any:
            if not isinstance(argument.meta["val"], torch.Tensor):
                return self.values[argument]
            view = self.view(argument)
            dtypes[view] = argument.meta["val"].dtype
            return view

        args, kwargs = fx.map_arg((node.args, node.kwargs), place)
        results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
        outs, values = [], []
        for index, result in enumerate(results):
            if not isinstance(result, torch.Tensor):
                raise TypeError(f"{node} returns {type(result).__name__}, which no region can hold")
            shape = tuple(self.size(size) for size in result.shape)
            name = f"{node.name}_{index}" if index else node.name
            buffer = Buffer("foreign", name, self.held(result.dtype), shape)
            outs.append(buffer)
            values.append(Value(Load(buffer.view()), shape, result.dtype))
        self.emit(Foreign(node, args, kwargs, dtypes, tuple(outs), reason))
        return tuple(values) if isinstance(node.meta["val"], (tuple, list)) else values[0]

    def _outputs(self, node: fx.Node) -> None:
        for index, result in enumerate(node.args[0]):  # type: ignore[arg-type]
            value = self.value(result)
            if value.dtype == torch.float64:
                raise self._refused("kernels compute in float32, and it returns numbers of float64")
            buffer = Buffer("output", f"output_{index}", value.dtype, value.shape)
            self.schedule.outputs.append(buffer)
            self.store(value, buffer.view())


def _without(body: Scalar, anchor: Any, load: Load) -> Scalar:
    """``body`` with the stored results of ``anchor`` in place of its lane."""
    return rebuild(body, lambda scalar: load if isinstance(scalar, Lane) and scalar.anchor is anchor else None)


def _is_free(body: Scalar) -> bool:
    """Whether reading ``body`` again costs no more than reading memory."""
    return all(isinstance(scalar, (Load, Const, SizeOf, Iota)) or _is_cast(scalar) for scalar in walk(body))


def _is_cast(scalar: Scalar) -> bool:
    return getattr(scalar, "name", None) == "cast"


def _pointwise(lowering: Lowering, node: fx.Node) -> Value:
    build = builder(node.target)
    if build is None:
        raise Unsupported(f"{node.target} has no kernel")
    shape, dtype = lowering.type(node)
    if dtype.is_complex:
        raise Unsupported(f"{node.target} of complex numbers has no kernel")
    operands, options = split_arguments(lowering, node, shape)
    return Value(build(operands, options, computed(dtype)), shape, dtype)


def split_arguments(lowering: Lowering, node: fx.Node, shape: Sequence[Size]) -> tuple[list[Scalar], dict[str, Any]]:
    """(tensors and numbers of a pointwise node as scalars over ``shape``, its options by name)."""
    schema = node.target._schema  # type: ignore[union-attr]
    operands: list[Scalar] = []
    options: dict[str, Any] = {}
    bound = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    for given in schema.arguments:
        value = bound.get(given.name)
        if given.name not in bound or value is None:
            continue
        kind = str(given.type)
        if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor):
            scalar: Scalar = expand(_broadcastable(lowering, value, shape), shape)
        elif isinstance(value, fx.Node):
            scalar = SizeOf(lowering.size(value))
        elif isinstance(value, (int, float)) and kind in ("number", "Scalar", "Tensor", "Optional[number]"):
            scalar = (
                const(value, I64 if type(value) is int else F32)
                if type(value) is not bool
                else Const(value, torch.bool)
            )
        else:
            options[given.name] = value
            continue
        if given.name in ("alpha", "min", "max", "value", "beta", "threshold", "negative_slope") and not (
            given.name == "value" and "masked_fill" in schema.name
        ):
            options[given.name] = scalar.value if isinstance(scalar, Const) else scalar
        else:
            operands.append(scalar)
    return operands, options


def _broadcastable(lowering: Lowering, node: fx.Node, shape: Sequence[Size]) -> Value:
    """The value of ``node``; one that still is an anchor's must be as large as ``shape``."""
    value = lowering.value(node)
    whole = len(value.shape) == len(shape) and all(same(a, b) for a, b in zip(value.shape, shape, strict=True))
    return value if whole else lowering.plain(value)
