"""A Program as text: a typed Python function that runs, and that reads back as the same graph.

Executing the text defines ``forward(weights, *inputs)`` over ``torch.ops``; ``parse`` reads it without executing
anything, one assignment a node, so that an artifact is data.
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import json
import operator
import tokenize
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx

from slim import errors
from slim.compiler.program import Facts, Program
from slim.compiler.types import LONG, SIZE_OPS, Input, not_in_dialect, show_shape, show_type
from slim.compiler.weights import Weights

HEADER = "# slim IR 1"
PRELUDE = """from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan
"""

_TAKEN = frozenset({"weights", "forward", "math", "operator", "torch", "aten", "slim", "inf", "nan"})


def free_name(name: str, others: Container[str]) -> str:
    """What an input of that name is called in the text, where some names mean something else."""
    numbered = (f"{name}_{number}" for number in itertools.count(1))
    return name if name not in _TAKEN else next(each for each in numbered if each not in others)


# -- printing ----------------------------------------------------------------------------------------------------------


def print_program(program: Program) -> str:
    """The whole text: header, prelude, one typed line an operation with the module and line it came from."""
    name = program.facts.architecture or "model"
    size = f"{program.parameters:,} parameters, {program.nbytes:,} bytes"
    return "\n".join([f"{HEADER}: {name}, {size}", PRELUDE, "", *_function(program), ""])


def _function(program: Program) -> Iterator[str]:
    types = {value.name: show_shape(value.dtype, value.shape) for value in program.inputs}
    arguments = [f"{n.name}: {types[str(n.target)]}" for n in program.graph.find_nodes(op="placeholder")]
    yield f"def forward(weights, {', '.join(arguments)}):"
    for node in program.graph.nodes:
        if node.op == "call_function":
            yield f"    {print_node(program, node)}{_origin(node)}"
        elif node.op == "output":
            yield f"    return {_literal(node.args[0])}"


def print_node(program: Program, node: fx.Node) -> str:
    """The line of one operation, without the comment."""
    return f"{node.name}: {show_type(node.meta['val'], program.dims)} = {_call(node)}"


def target_name(target: Any) -> str:
    """An operation as the text spells it."""
    return "operator.getitem" if target is operator.getitem else _target_name(target)


def _origin(node: fx.Node) -> str:
    module, place = node.meta.get("module", ""), node.meta.get("where", "")
    told = [module, f"@ {place}" if place else ""]  # no place: of torch's own modules, whose source is not the user's
    return "  # " + " ".join(filter(None, told)) if any(told) else ""


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{_literal(node.args[0])}[{_literal(node.args[1])}]"
    arguments = [_literal(a) for a in node.args] + [f"{k}={_literal(v)}" for k, v in node.kwargs.items()]
    return f"{_target_name(node.target)}({', '.join(arguments)})"


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{'torch' if target.__module__ == 'torch' else 'operator'}.{target.__name__}"


def _literal(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"weights[{json.dumps(value.target, ensure_ascii=False)}]" if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        body = ", ".join(_literal(v) for v in value)
        return f"[{body}]" if isinstance(value, list) else f"({body}{',' * (len(value) == 1)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    return repr(value)


# -- reading -----------------------------------------------------------------------------------------------------------


def parse(text: str, weights: Weights, facts: Facts | None = None) -> Program:
    """The Program that ``text`` prints, over ``weights``; nothing in the text is executed.

    Types on the left are those of the operations, or ``any``.

    Raises:
        BadIR: where the text is not slim IR, with its line.
    """
    function = _find_function(text)
    inputs = tuple(_read_input(argument) for argument in _arguments(function)[1:])
    program = Program(fx.Graph(), weights, inputs, facts or Facts())
    _Reader(program, _comments(text)).read(function)
    return program


def _find_function(text: str) -> ast.FunctionDef:
    if text.partition("\n")[0].partition(":")[0] != HEADER:
        raise errors.BadIR(line=1, reason=f"the first line does not begin with {HEADER!r}")
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise errors.BadIR(line=error.lineno or 0, reason=error.msg) from error
    except (ValueError, RecursionError, MemoryError) as error:  # zero bytes, endless nesting
        raise errors.BadIR(line=1, reason=f"it is not Python ({error})") from error
    for statement in body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "forward":
            return statement
    raise errors.BadIR(line=1, reason="there is no function `forward`")


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    """``weights``, and the inputs."""
    names = function.args
    plain = not (names.posonlyargs or names.kwonlyargs or names.vararg or names.kwarg or names.defaults)
    if not plain or not names.args or names.args[0].arg != "weights":
        raise errors.BadIR(line=function.lineno, reason="its arguments are not `weights` and then typed inputs")
    return names.args


def _read_input(argument: ast.arg) -> Input:
    annotation: Any = argument.annotation
    try:
        dims = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        shape = tuple(d.id if isinstance(d, ast.Name) else _size(d) for d in dims)
        return Input(argument.arg, LONG[annotation.value.id], shape)
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise errors.BadIR(line=argument.lineno, reason=f"input {argument.arg} has no readable type") from error


def _size(dim: ast.expr) -> int:
    size = int(ast.literal_eval(dim))
    if size < 0:
        raise ValueError("a dimension is negative")
    return size


def _comments(text: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.string[2:] for t in tokens if t.type == tokenize.COMMENT}


class _Reader:
    """Turns the statements of ``forward`` into nodes."""

    def __init__(self, program: Program, comments: dict[int, str]) -> None:
        self.program = program
        self.comments = comments
        self.values: dict[str, fx.Node] = {}

    def read(self, function: ast.FunctionDef) -> None:
        graph = self.program.graph
        for value in self.program.inputs:
            self.values[value.name] = self._typed(graph.placeholder(value.name))
        for statement in function.body:
            try:
                self._statement(statement)
            except errors.SlimError:
                raise
            except Exception as error:  # whatever a shape function or a malformed literal raises, with its line
                raise errors.BadIR(line=statement.lineno, reason=f"{type(error).__name__}: {error}") from error
        if not graph.find_nodes(op="output"):
            raise errors.BadIR(line=function.lineno, reason="it returns nothing")

    def _statement(self, statement: ast.stmt) -> None:
        graph = self.program.graph
        if graph.find_nodes(op="output"):
            raise errors.BadIR(line=statement.lineno, reason="it goes on after `return`")
        if isinstance(statement, ast.Return) and statement.value is not None:
            self._typed(graph.output(self._value(statement.value)))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            if statement.target.id in self.values:
                raise errors.BadIR(line=statement.lineno, reason=f"{statement.target.id} has a value already")
            target, args, kwargs = self._operation(statement.value)
            node = graph.create_node("call_function", target, args, kwargs, name=statement.target.id)
            self._provenance(node, statement.lineno)
            self.values[statement.target.id] = self._typed(node)
            shown = show_type(node.meta["val"], self.program.dims)
            if not _is_type(statement.annotation, _type(shown)):
                reason = f"{node.name} is {shown}, and not {ast.unparse(statement.annotation)}"
                raise errors.BadIR(line=statement.lineno, reason=reason)
        else:
            raise errors.BadIR(line=statement.lineno, reason="expected `name: type = operation(...)` or `return`")

    def _operation(self, node: ast.expr) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        if isinstance(node, ast.Subscript):
            return operator.getitem, (self._value(node.value), self._value(node.slice)), {}
        if not isinstance(node, ast.Call):
            raise ValueError("expected a call")
        args = tuple(self._value(a) for a in node.args)
        if any(k.arg is None for k in node.keywords):
            raise ValueError("expected keywords by name, not **")
        return _read_target(node.func), args, {str(k.arg): self._value(k.value) for k in node.keywords}

    def _typed(self, node: fx.Node) -> fx.Node:
        node.meta["val"] = self.program.typer.value(node, self.program.weights)
        return node

    def _provenance(self, node: fx.Node, line: int) -> None:
        module, _, place = f" {self.comments.get(line, '')}".partition(" @ ")
        node.meta.update({key: v for key, v in (("module", module.lstrip()), ("where", place)) if v})

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name(id="inf" | "nan"):
                return float(node.id)
            case ast.Name():
                return self.values[node.id]
            case ast.Subscript(value=ast.Name(id="weights"), slice=ast.Constant(value=str(name))):
                if name not in self.program.weights:
                    raise KeyError(f"there is no weight {name!r}")
                return self.program.weight_node(name)
            case ast.List():
                return [self._value(v) for v in node.elts]
            case ast.Tuple():
                return tuple(self._value(v) for v in node.elts)
            case ast.UnaryOp(op=ast.USub()):
                return -self._value(node.operand)
            case ast.Attribute(value=ast.Name(id="torch")):
                return _torch_constant(node.attr)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="device")):
                return torch.device(ast.literal_eval(node.args[0]))
        return ast.literal_eval(node)


@functools.cache  # layers repeat theirs
def _type(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _is_type(written: ast.expr, made: ast.expr) -> bool:
    """Whether one says no other than the other; sizes that are formulas may be written in more than one way."""
    match written, made:
        case ast.Name(id="any"), _:
            return True
        case ast.Tuple(), ast.Tuple():
            return len(written.elts) == len(made.elts) and all(map(_is_type, written.elts, made.elts))
        case ast.Subscript(), ast.Subscript():
            return _is_type(written.value, made.value) and _is_type(written.slice, made.slice)
        case (ast.Name(), ast.Name()) | (ast.Constant() | ast.Tuple() | ast.Subscript(), _) | (_, ast.Constant()):
            return ast.dump(written) == ast.dump(made)
    return not isinstance(made, ast.Tuple | ast.Subscript)


def _torch_constant(name: str) -> Any:
    value = getattr(torch, name)
    if not isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        raise ValueError(f"torch.{name} is not a dtype, layout or memory format")
    return value


def _read_target(node: ast.expr) -> Any:
    match node:
        case ast.Attribute(value=ast.Name(id="operator" | "torch"), attr=name):
            target: Any = {op.__name__: op for op in SIZE_OPS}.get(name)
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id=("aten" | "slim") as space), attr=op), attr=overload):
            # these attributes may lead to anything that Python objects have: looked at before it is called
            target = getattr(getattr(getattr(torch.ops, space), op, None), overload, None)
        case _:
            target = None
    if target is None or not_in_dialect(target):
        raise ValueError(f"{ast.unparse(node)} is not an operation of the dialect")
    return target
