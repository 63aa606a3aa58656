"""From a graph that Dynamo captured to a Program: weights are frozen in, sizes are read off tensors, and what the graph
does to its inputs is set apart, so that the Program itself is a function."""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.export import Dim

from slim import errors
from slim.compiler.lift.export import export
from slim.compiler.program import Facts, Program
from slim.compiler.raising import raise_program
from slim.compiler.verify import verify

Give = Callable[[Sequence[Any], Sequence[Any]], Any]  # (arguments, the Program's outputs) -> one result
Size = Callable[[Sequence[Any]], int]  # arguments -> a number

_TRAINS: dict[Any, str] = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}
# What says whether gradients are recorded from here on.
_GRAD_MODES = (
    torch._C._set_grad_enabled,
    torch.autograd.grad_mode._enter_inference_mode,
    torch.autograd.grad_mode._exit_inference_mode,
)
_NORMS = {function: inspect.signature(function) for function in _TRAINS}


@dataclass(frozen=True)
class Captured:
    """A Program, and how a call of the captured graph becomes one of it.

    Attributes:
        program: None where there is nothing to compute: all results are inputs, or views of them.
        frozen: place among the arguments -> the weight that was frozen into the Program.
        inputs: places of the arguments that the Program takes, in its order.
        results: how each result is made, in order.
        mutated: (place of an argument, place among the Program's outputs of what it must hold afterwards).
        shapes: place among the arguments -> the only shape that the Program takes there, where sizes are fixed.
        numbers: place among the arguments -> the only number that it takes there; a float lies in a tensor.
    """

    program: Program | None
    frozen: dict[int, Tensor]
    inputs: tuple[int, ...]
    results: tuple[Give, ...]
    mutated: tuple[tuple[int, int], ...]
    shapes: dict[int, torch.Size]
    numbers: dict[int, float]


def capture(module: fx.GraphModule, examples: Sequence[Any], *, fixed: bool = False) -> Captured:
    """Lifts ``module``, whose placeholders are weights, sizes and inputs, on ``examples``, one for each.

    Args:
        fixed: for the sizes and numbers of ``examples`` alone, whatever Dynamo would let change.

    Raises:
        LiftFailed, UnsupportedModel: as ``lift``.
    """
    return _Capture(module, examples, fixed).made()


class _Capture:
    def __init__(self, module: fx.GraphModule, examples: Sequence[Any], fixed: bool) -> None:
        self.module = fx.GraphModule(module, _copied(module.graph))
        self.examples, self.fixed = list(examples), fixed
        self.placeholders = self.module.graph.find_nodes(op="placeholder")
        self.places = {node: place for place, node in enumerate(self.placeholders)}
        self.frozen: dict[int, Tensor] = {}
        self.numbers: dict[int, float] = {}

    def made(self) -> Captured:
        self._erase_grad_modes()
        self._read_floats()
        changed = [node for node in self.placeholders if _is_mutated(node)]
        results = self._results()
        kept = [place for place, give in enumerate(results) if give is None]
        self._set_outputs(kept, changed)
        self._freeze(set(changed))
        self._read_sizes()
        gives = self._numbered(results)
        mutated = tuple((self.places[node], len(kept) + index) for index, node in enumerate(changed))
        inputs = tuple(self.places[node] for node in self.module.graph.find_nodes(op="placeholder"))
        program = self._lifted(inputs) if kept or changed else None
        shapes = {place: self.examples[place].shape for place in inputs if self.fixed}
        return Captured(program, self.frozen, inputs, gives, mutated, shapes, self.numbers)

    # -- results -------------------------------------------------------------------------------------------------------

    def _results(self) -> list[Give | None]:
        """How each result is made; None for those that the Program computes."""
        found: list[Give | None] = []
        outputs: Any = self.module.graph.output_node().args[0]
        for value in outputs:
            found.append(self._apart(value))
        return found

    def _apart(self, value: Any) -> Give | None:
        if not isinstance(value, fx.Node):
            return lambda arguments, outputs: value
        if value in self.places:
            place = self.places[value]
            return lambda arguments, outputs: arguments[place]
        example = value.meta.get("example_value")
        if isinstance(example, torch.SymInt):
            size = self._size(example)
            return lambda arguments, outputs: size(arguments)
        if isinstance(example, Tensor):
            return self._view(example)
        return None

    def _view(self, example: Tensor) -> Give | None:
        """What lies in the memory of an input, as the input is once it has been written to; None for what does not."""
        memory = example.untyped_storage()._cdata
        held = ((place, node.meta.get("example_value")) for node, place in self.places.items())
        found = [(place, x) for place, x in held if isinstance(x, Tensor) and x.untyped_storage()._cdata == memory]
        if not found:
            return None
        place, base = found[0]
        if example.dtype != base.dtype or example.is_conj() != base.is_conj():
            raise _failed("it returns the memory of an input as another type; return a copy")
        shape, strides = ([self._size(size) for size in sizes] for sizes in (example.shape, example.stride()))
        start = self._size(example.storage_offset() - base.storage_offset())

        def give(arguments: Sequence[Any], outputs: Sequence[Any]) -> Tensor:
            given: Tensor = arguments[place]
            sizes, steps = ([size(arguments) for size in each] for each in (shape, strides))
            return given.as_strided(sizes, steps, given.storage_offset() + start(arguments))

        return give

    def _size(self, size: Any) -> Size:
        """A number, or an expression in the sizes of what is given."""
        if not isinstance(size, torch.SymInt):
            return lambda arguments: int(size)
        expression = size.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        known = [self._symbol(symbol) for symbol in symbols]
        compute = sympy.lambdify(symbols, expression, [{"FloorDiv": operator.floordiv}, "math"])
        return lambda arguments: int(compute(*(value(arguments) for value in known)))

    def _symbol(self, symbol: Any) -> Size:
        for node, place in self.places.items():
            example = node.meta.get("example_value")
            if isinstance(example, torch.SymInt) and example.node.expr == symbol:
                return partial(_argument, place)
            for dim, size in enumerate(example.shape if isinstance(example, Tensor) else ()):
                if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                    return partial(_dimension, place, dim)
        raise _failed(f"it returns a size, {symbol}, that is not among its arguments")

    def _numbered(self, results: Sequence[Give | None]) -> tuple[Give, ...]:
        """Gives those that the Program computes their places among its outputs."""
        gives: list[Give] = []
        count = 0
        for give in results:
            if give is None:
                gives.append(_output(count))
                count += 1
            else:
                gives.append(give)
        return tuple(gives)

    # -- the graph -----------------------------------------------------------------------------------------------------

    def _set_outputs(self, kept: Sequence[int], changed: Sequence[fx.Node]) -> None:
        """Leaves what the Program computes, and behind it what mutated inputs hold in the end.

        Those are worked on as copies: the caller's are written once, when all is done.
        """
        graph = self.module.graph
        output = graph.output_node()
        copies = []
        for node in changed:
            with graph.inserting_before(_first_operation(graph)):
                copy = graph.call_method("clone", (node,))
            node.replace_all_uses_with(copy)
            copy.args = (node,)
            copies.append(copy)
        values: Any = output.args[0]
        output.args = ((*(values[place] for place in kept), *copies),)

    def _freeze(self, changed: set[fx.Node]) -> None:
        """Parameters and buffers become the module's own, under the names that the model has for them."""
        graph = self.module.graph
        names: set[str] = set()
        for node, example in zip(self.placeholders, self.examples, strict=True):
            if node in changed or not isinstance(example, Tensor) or not _is_weight(node, example):
                continue
            name = _unique(_weight_name(node.name), names)
            if isinstance(example, torch.nn.Parameter):
                self.module.register_parameter(name, example)
            else:
                self.module.register_buffer(name, example)
            with graph.inserting_before(_first_operation(graph)):
                inner = graph.get_attr(name)
            node.replace_all_uses_with(inner)
            graph.erase_node(node)
            self.frozen[self.places[node]] = example

    def _erase_grad_modes(self) -> None:
        """The Program records no gradients, whatever the model says in between."""
        for node in reversed([node for node in self.module.graph.nodes if node.target in _GRAD_MODES]):
            self.module.graph.erase_node(node)

    def _read_floats(self) -> None:
        """A float is a tensor among the arguments, whose ``item`` is called: it is compiled in."""
        for node in self.module.graph.find_nodes(op="call_method", target="item"):
            if not isinstance(node.meta.get("example_value"), torch.SymFloat):
                continue
            tensor: Any = node.args[0]
            if tensor not in self.places:
                raise _failed(f"it takes the number in {tensor}, a tensor that it computes, out of it")
            number = self.numbers[self.places[tensor]] = float(self.examples[self.places[tensor]])
            node.replace_all_uses_with(number)
            self.module.graph.erase_node(node)

    def _read_sizes(self) -> None:
        """A size among the arguments is one of a tensor's: it is read there. Where it is fixed, it is a number."""
        graph = self.module.graph
        for node in graph.find_nodes(op="placeholder"):
            example = node.meta.get("example_value")
            if self.places[node] in self.numbers:
                self.module.graph.erase_node(node)
                continue
            if isinstance(example, Tensor):
                continue
            if node.users and self.fixed:
                node.replace_all_uses_with(self._number(self.places[node]))
            elif node.users:
                owner, dim = self._owner(example)
                with graph.inserting_before(_first_operation(graph)):
                    size = graph.call_method("size", (owner, dim))
                node.replace_all_uses_with(size)
            graph.erase_node(node)

    def _number(self, place: int) -> int:
        given = self.examples[place]
        number: int = given.node.hint if isinstance(given, torch.SymInt) else given  # int() would fix it for Dynamo too
        self.numbers[place] = number
        return number

    def _share_sizes(self) -> None:
        """Says of sizes that are one symbol to Dynamo that they are equal, so that they are one to torch.export."""
        graph, first = self.module.graph, dict[Any, tuple[fx.Node, int]]()
        for node in graph.find_nodes(op="placeholder"):
            for dim, size in enumerate(node.meta["example_value"].shape):
                if not isinstance(size, torch.SymInt):
                    continue
                owner = first.setdefault(size.node.expr, (node, dim))
                if owner != (node, dim):
                    with graph.inserting_before(_first_operation(graph)):
                        both = [graph.call_method("size", each) for each in (owner, (node, dim))]
                        graph.call_function(torch._check, (graph.call_function(operator.eq, tuple(both)),))

    def _owner(self, size: Any) -> tuple[fx.Node, int]:
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        for node in self.module.graph.find_nodes(op="placeholder"):
            example = node.meta.get("example_value")
            if isinstance(example, Tensor):
                for dim, length in enumerate(example.shape):
                    if isinstance(length, torch.SymInt) and length.node.expr == expression:
                        return node, dim
        raise _failed(f"a number that it takes, {expression}, is no size of its tensors; make it a tensor")

    def _lifted(self, inputs: Sequence[int]) -> Program:
        graph = self.module.graph
        examples, shapes = [], []
        names = {node.name for node in graph.nodes}
        for node, place in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
            fake = node.meta["example_value"]
            node.target = node.name = _unique(_input_name(node.name), names)
            examples.append(self.examples[place].detach())
            free = [isinstance(size, torch.SymInt) and not self.fixed for size in fake.shape]
            shapes.append({d: Dim.AUTO if each else Dim.STATIC for d, each in enumerate(free)})
        if not self.fixed:
            self._share_sizes()
        graph.lint()
        self.module.recompile()
        facts = Facts(kind="module", architecture="the captured graph")
        targets = [str(node.target) for node in graph.find_nodes(op="placeholder")]
        dynamic = dict(zip(targets, shapes, strict=True))
        program = export(self.module, tuple(examples), {}, dynamic, facts)
        program.raised = raise_program(program)
        verify(program, "lift")
        return program


def _output(place: int) -> Give:
    return lambda arguments, outputs: outputs[place]


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy


def _argument(place: int, arguments: Sequence[Any]) -> int:
    return int(arguments[place])


def _dimension(place: int, dim: int, arguments: Sequence[Any]) -> int:
    size: int = arguments[place].shape[dim]
    return size


def _is_mutated(node: fx.Node) -> bool:
    example = node.meta.get("example_value")
    return isinstance(example, Tensor) and (example._version > 0 or any(node in _averages(user) for user in node.users))


def _averages(node: fx.Node) -> Sequence[Any]:
    """The running averages that a norm in training writes to, of which no version is counted."""
    schema = _NORMS.get(node.target)
    if schema is None:
        return ()
    given = schema.bind(*node.args, **node.kwargs).arguments
    return [given.get("running_mean"), given.get("running_var")] if given.get(_TRAINS[node.target]) else ()


def _is_weight(node: fx.Node, example: Tensor) -> bool:
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return isinstance(example, torch.nn.Parameter) or static is not None


def _weight_name(name: str) -> str:
    """l_self_modules_layers_modules_0_parameters_weight_ -> layers_0_weight."""
    name = re.sub(r"^l_self_|^l_", "", name.lower()).strip("_")
    return re.sub(r"(^|_)(modules|parameters|buffers)_", r"\1", name).strip("_") or "weight"


def _input_name(name: str) -> str:
    """l_input_ids_ -> input_ids; l_kwargs_attention_mask_ -> attention_mask."""
    short = re.sub(r"^l_(kwargs_|args_)?", "", name).strip("_")
    return short if short.isidentifier() and not keyword.iskeyword(short) else f"input_{short}"


def _unique(name: str, names: set[str]) -> str:
    found, count = name, 1
    while found in names:
        found, count = f"{name}_{count}", count + 1
    names.add(found)
    return found


def _first_operation(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def _failed(reason: str) -> errors.LiftFailed:
    return errors.LiftFailed(module="the captured graph", line="its arguments", reason=reason)
