"""Types of values: dtype and symbolic shape, inferred by running the graph on fake tensors."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from slim.compiler.weights import Weights

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}
LONG = {short: dtype for dtype, short in SHORT.items()}

# Hints for symbolic dimensions: unlike each other and unlike any width a model has, so that no two sizes are
# taken for one; small, so that nothing that depends on them is large.
_HINTS = (5, 11, 17, 23, 29, 37, 41, 43, 53, 59, 61)


@dataclass(frozen=True)
class Input:
    """One input of a Program: a dimension is a number, or the name of a symbol ("B", "S")."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


class Typer:
    """Gives every node of a graph its ``meta["val"]``: a fake tensor, a symbolic integer, or a tuple of them."""

    def __init__(self, inputs: tuple[Input, ...]) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        names = list(dict.fromkeys(d for value in inputs for d in value.shape if isinstance(d, str)))
        self._declare(inputs, dict(zip(names, _HINTS, strict=False)))

    def _declare(self, inputs: tuple[Input, ...], hints: dict[str, int]) -> None:
        self._declared = inputs
        self.inputs = {value.name: self._fake_input(value, hints) for value in inputs}
        self.dims: dict[sympy.Symbol, str] = {}
        for value in inputs:
            for position, dim in enumerate(value.shape):
                if isinstance(dim, str):
                    size: Any = self.inputs[value.name].shape[position]
                    self.dims[size.node.expr] = dim

    def extended(self, inputs: tuple[Input, ...]) -> Typer:
        """These types with more inputs: types made so far stay valid, since known symbols keep their meaning."""
        other = copy.copy(self)
        names = list(
            dict.fromkeys(d for value in (*self._declared, *inputs) for d in value.shape if isinstance(d, str))
        )
        other._declare(inputs, dict(zip(names, _HINTS, strict=False)))
        return other

    def _fake_input(self, value: Input, hints: dict[str, int]) -> FakeTensor:
        sizes = [hints[d] if isinstance(d, str) else d for d in value.shape]
        dynamic = [DimDynamic.DUCK if isinstance(d, str) else DimDynamic.STATIC for d in value.shape]
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dynamic)
        return self.mode.from_tensor(torch.empty(sizes, dtype=value.dtype), symbolic_context=context)

    def weight(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype)

    def infer(self, graph: fx.Graph, weights: Weights) -> None:
        """Types every node, in order; an error of a node's own shape function comes out as it is."""
        for node in graph.nodes:
            node.meta["val"] = self.value(node, weights)

    def value(self, node: fx.Node, weights: Weights) -> Any:
        """The type of one node, from those of its arguments."""
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        if node.op == "get_attr":
            return self.weight(weights.shape(str(node.target)), weights.dtype(str(node.target)))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if node.op == "output":
            return args[0]
        if not callable(node.target):
            raise TypeError(f"{node.op} of {node.target!r} is not an operation")
        with self.mode, torch.no_grad():
            value = _SHAPES.get(node.target, node.target)(*args, **kwargs)
        self._refuse_fixed(node.target)
        return value

    def _refuse_fixed(self, target: Any) -> None:
        """A shape function that asks a symbolic size for its number fixes it for good, and says nothing."""
        fixed = self.mode.shape_env.replacements if self.mode.shape_env is not None else {}
        for symbol, name in self.dims.items():
            if symbol in fixed:
                raise ValueError(f"{target} is only known for {name} = {fixed[symbol]}")


_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_REAL = {complex_: real for real, complex_ in _COMPLEX.items()}


def _polar(radius: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    return angle.new_empty((radius * angle).shape, dtype=_COMPLEX[angle.dtype])


def _view_as_complex(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=_COMPLEX[x.dtype])


def _view_as_real(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape, 2), dtype=_REAL[x.dtype])


# Shape functions in place of torch's own, which ask for numbers where there are symbols.
_SHAPES: dict[Any, Any] = {
    torch.ops.aten.polar.default: _polar,
    torch.ops.aten.view_as_complex.default: _view_as_complex,
    torch.ops.aten.view_as_real.default: _view_as_real,
}


def show_dim(size: Any, dims: Mapping[sympy.Symbol, str]) -> str:
    """A dimension as people write it: ``64``, ``B``, ``S + 1``."""
    expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
    named = expr.xreplace({symbol: sympy.Symbol(name) for symbol, name in dims.items()})
    return str(named)


def show_shape(dtype: torch.dtype, shape: Iterable[Any]) -> str:
    """``f32[64, 32]``, of sizes that have their text already."""
    return f"{SHORT[dtype]}[{', '.join(map(str, shape)) or '()'}]"


def show_type(value: Any, dims: Mapping[sympy.Symbol, str]) -> str:
    """``f32[B, S, 64]``, ``int`` for a size, ``tuple[...]`` for several."""
    if isinstance(value, torch.Tensor):
        return show_shape(value.dtype, (show_dim(d, dims) for d in value.shape))
    if isinstance(value, (tuple, list)):
        return f"tuple[{', '.join(show_type(v, dims) for v in value)}]"
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return "int"
    return type(value).__name__


def expression(size: Any, dims: Mapping[sympy.Symbol, str]) -> sympy.Expr:
    """A dimension as a sympy expression in the named symbols (integer, positive)."""
    expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    return expr.xreplace({s: sympy.Symbol(n, integer=True, positive=True) for s, n in dims.items()})


SIZE_OPS = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        torch.sym_max,
        torch.sym_min,
    }
)

_OUTSIDE = frozenset({"aten::from_file", "aten::save", "aten::_print", "aten::warn"})
_IN_PLACE = frozenset({"slim::cached_attention", "slim::paged_attention"})  # they write into the cache they are given


def not_in_dialect(target: Any) -> str | None:
    """Why a node may not call ``target``; None where it may.

    A node computes its value from its arguments and does nothing else: a rewrite may share it, move it or drop it, and
    IR from elsewhere can touch no file.
    """
    if target is operator.getitem or any(target is op for op in SIZE_OPS):
        return None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "slim"):
        return f"{target} is not part of the dialect (aten, slim, sizes)"
    name = target._schema.name
    if name in _OUTSIDE:
        return f"{target} reaches outside the program"
    if target._schema.is_mutable and name not in _IN_PLACE:
        return f"{target} writes into its arguments"
    return None
