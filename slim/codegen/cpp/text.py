"""Sizes and scalars as C++ text."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from slim.codegen.regions.scalars import BOOL, F32, I64, Const, Gather, Iota, Lane, Load, Op, Scalar, SizeOf, walk
from slim.codegen.regions.views import Buffer, Size, View

COMPUTED = {F32: "float", I64: "i64", BOOL: "bool"}
STORED = {
    torch.float64: "double", torch.float32: "float", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
    torch.float8_e4m3fn: "fp8",
}  # fmt: skip

# enum Format of kernels.h, by Matrix.format
FORMATS = {"f32": 0, "bf16": 1, "f16": 2, "int8": 3, "int4": 4, "int3": 5, "nf4": 6, "fp8": 7}

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "land": "&", "lor": "|", "lxor": "!=", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
    "truncdiv": "/",
}  # fmt: skip
_CALLS = {
    "exp": "exp_f", "log": "log_f", "log1p": "log1p_f", "expm1": "expm1_f", "tanh": "tanh_f", "erf": "erf_f",
    "sigmoid": "sigmoid_f", "silu": "silu_f", "gelu": "gelu_f", "gelu_tanh": "gelu_tanh_f", "sin": "sin_f",
    "cos": "cos_f", "pow": "pow_f", "sqrt": "std::sqrt", "floor": "std::floor", "ceil": "std::ceil",
    "round": "std::nearbyint", "trunc": "std::trunc", "floordiv": "floor_div", "exp2": "std::exp2",
    "log2": "std::log2",
}  # fmt: skip
_FORMS = {
    "neg": "(-{0})", "lnot": "(!{0})", "not": "(~{0})", "rsqrt": "(1.0f / std::sqrt({0}))",
    "reciprocal": "(1.0f / {0})", "where": "({0} ? {1} : {2})", "max": "({0} > {1} ? {0} : {1})",
    "min": "({0} < {1} ? {0} : {1})", "abs": "({0} < 0 ? -{0} : {0})", "sign": "(({0} > 0) - ({0} < 0))",
}  # fmt: skip


def _size_text(expr: Any) -> str:
    """Integer arithmetic; a quotient of sizes is rounded down, as Python's is."""
    if expr.is_Symbol:
        return str(expr)
    if expr.is_Integer:
        return f"i64({int(expr)})"
    name = type(expr).__name__
    args = [_size_text(arg) for arg in expr.args] if not expr.is_Rational else []
    if name in ("FloorDiv", "CleanDiv", "IntTrueDiv"):
        return f"floor_div({args[0]}, {args[1]})"
    if name in ("Mod", "PythonMod"):
        return f"floor_mod({args[0]}, {args[1]})"
    if name in ("Max", "Min"):
        return functools.reduce(lambda a, b: f"size_{name.lower()}({a}, {b})", args)
    if name in ("floor", "ToFloat", "TruncToInt"):
        return args[0]
    if name == "Pow" and expr.args[1].is_Integer and expr.args[1] > 0:
        return "(" + " * ".join([args[0]] * int(expr.args[1])) + ")"
    numerator, denominator = expr.as_numer_denom()
    if denominator != 1:
        return f"floor_div({_size_text(numerator)}, {_size_text(denominator)})"
    if name in ("Add", "Mul"):
        return "(" + (" + " if name == "Add" else " * ").join(args) + ")"
    raise ValueError(f"the size {expr} has no form in C++")


@dataclass
class Sizes:
    """The sizes that a program needs: each distinct one is computed once a call.

    Attributes:
        dims: names of the symbolic dimensions, in the order in which a call brings them.
    """

    dims: Sequence[str]
    fields: dict[str, str] = field(default_factory=dict)  # C++ expression -> name
    _known: dict[Any, str] = field(default_factory=dict)

    def text(self, size: Size) -> str:
        """``size`` where ``z`` holds the sizes of the call."""
        if isinstance(size, int):
            return str(size)
        if size not in self._known:
            self._known[size] = self._new(sympy.sympify(size))
        return self._known[size]

    def _new(self, size: sympy.Expr) -> str:
        size = sympy.expand(size)
        if size.is_Integer:
            return str(int(size))
        expr = _size_text(size)
        if expr in self.dims:
            return f"z.{expr}"
        return f"z.{self.fields.setdefault(expr, f'n{len(self.fields)}')}"

    def source(self) -> str:
        """struct Sizes, and the function that computes it."""
        names = [*self.dims, *self.fields.values()]
        lines = ["struct Sizes {", f"    i64 {', '.join(names)};" if names else "", "};", ""]
        lines += ["static Sizes sizes(const i64* dims) {", "    (void)dims;"]
        lines += [f"    const i64 {name} = dims[{index}];" for index, name in enumerate(self.dims)]
        lines += [f"    const i64 {name} = {expr};" for expr, name in self.fields.items()]
        lines += [f"    return Sizes{{{', '.join(names)}}};", "}"]
        return "\n".join(line for line in lines if line)


class Arguments:
    """The buffers of one kernel: they reach it as ``p[i]``, so that layers share its code."""

    def __init__(self) -> None:
        self.buffers: list[Buffer | None] = []

    def text(self, buffer: Buffer | None) -> str:
        """``p[i]`` for a buffer; None is the kernels' scratch."""
        if buffer not in self.buffers:
            self.buffers.append(buffer)
        return f"p[{self.buffers.index(buffer)}]"

    def pointer(self, view: View, sizes: Sizes, element: str | None = None) -> str:
        """The first element of a view."""
        kind = element or STORED[view.buffer.dtype]
        start = f"(({kind}*){self.text(view.buffer)})"
        return start if view.offset == 0 else f"({start} + {sizes.text(view.offset)})"


@dataclass
class Loop:
    """How an index reaches C++: the name of each dimension's variable; the last is the inner loop's.

    A dimension that is walked together with its neighbours has the variable of the group; see ``views.coalesce``.
    """

    groups: list[list[int]]
    names: list[str]

    def address(self, strides: Sequence[Size], sizes: Sizes, inner: bool) -> list[str]:
        """The terms of an address: those of the inner loop, or those of the others."""
        terms = []
        last = len(self.groups) - 1
        for position, (group, name) in enumerate(zip(self.groups, self.names, strict=True)):
            stride = strides[group[-1]] if group else 0  # a single number has no dimension
            if (position == last) == inner and stride != 0:
                terms.append(name if stride == 1 else f"{name} * {sizes.text(stride)}")
        return terms


class ScalarText:
    """Writes the trees of one loop: what does not change in the inner loop goes before it.

    Attributes:
        outer: statements before the inner loop.
        inner: statements in it.
    """

    def __init__(
        self, sizes: Sizes, arguments: Arguments, loop: Loop, lanes: Mapping[int, str] | None = None, tag: str = ""
    ) -> None:
        self.sizes, self.arguments, self.loop = sizes, arguments, loop
        self.tag = tag  # tells the variables of two texts in one scope apart
        self.lanes = dict(lanes or {})
        self.outer: list[str] = []
        self.inner: list[str] = []
        self._named: dict[str, str] = {}
        self._texts: dict[int, str] = {}

    def write(self, body: Scalar) -> str:
        """The variable, or literal, that holds ``body``."""
        for scalar in walk(body):
            if id(scalar) not in self._texts:
                self._texts[id(scalar)] = self._one(scalar)
        return self._texts[id(body)]

    def fresh(self) -> None:
        """Begins another inner loop over the same index."""
        self.inner = []
        self._texts = {}
        self._named = {text: name for text, name in self._named.items() if name.startswith("a")}

    def base(self, view: View) -> str:
        """The pointer to a view's row."""
        terms = [self.arguments.pointer(view, self.sizes), *self.loop.address(view.strides, self.sizes, False)]
        text = f"{STORED[view.buffer.dtype]}* const @ = {' + '.join(terms)};"
        return self._name(text, "a", self.outer)

    def _one(self, scalar: Scalar) -> str:
        if isinstance(scalar, Const):
            return literal(scalar)
        if isinstance(scalar, SizeOf):
            return self.sizes.text(scalar.size)
        if isinstance(scalar, Lane):
            return self.lanes[id(scalar.anchor)]
        if isinstance(scalar, Op):
            return self._statement(scalar, _operation(scalar, [self._texts[id(arg)] for arg in scalar.args]))
        if isinstance(scalar, Iota):
            terms = [
                term for inner in (False, True) for term in self.loop.address(scalar.map.strides, self.sizes, inner)
            ]
            return self._statement(scalar, " + ".join([self.sizes.text(scalar.map.offset), *terms]))
        assert isinstance(scalar, (Load, Gather))
        terms = self.loop.address(scalar.view.strides, self.sizes, True)
        if isinstance(scalar, Gather):
            for index, stride, count in scalar.terms:
                at = self._texts[id(index)]
                at = at if count is None else f"t.inside({at}, {self.sizes.text(count)})"
                terms.append(f"{at} * {self.sizes.text(stride)}")
        place = f"{self.base(scalar.view)}[{' + '.join(terms) or '0'}]"
        return self._statement(scalar, f"({COMPUTED[scalar.dtype]}){place}")

    def _statement(self, scalar: Scalar, text: str) -> str:
        return self._name(f"const {COMPUTED[scalar.dtype]} @ = {text};", "v", self.inner)

    def _name(self, text: str, prefix: str, lines: list[str]) -> str:
        if text not in self._named:
            self._named[text] = f"{prefix}{len(self._named)}{self.tag}"
            lines.append(text.replace("@", self._named[text]))
        return self._named[text]


def _operation(scalar: Op, args: list[str]) -> str:
    name = scalar.name
    if name == "cast":
        return f"{args[0]} != 0" if scalar.dtype == BOOL else f"({COMPUTED[scalar.dtype]}){args[0]}"
    if name == "mod":
        return f"{'floor_mod' if scalar.dtype == I64 else 'floor_mod_f'}({args[0]}, {args[1]})"
    if name in _INFIX:
        return f"({args[0]} {_INFIX[name]} {args[1]})"
    if name in _CALLS:
        return f"{_CALLS[name]}({', '.join(args)})"
    return _FORMS[name].format(*args)


def literal(scalar: Const) -> str:
    """A constant; C++ has no spelling for the infinite ones."""
    value = scalar.value
    if scalar.dtype == BOOL:
        return "true" if value else "false"
    if scalar.dtype == I64:
        return f"i64({int(value)})" if abs(int(value)) < 2**63 - 1 else "INT64_MIN" if value < 0 else "INT64_MAX"
    return number(float(value))


def number(value: float) -> str:
    """A float literal, rounded to float32 as it is read."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value) or abs(value) > 3.4028235677973366e38:
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{value!r}f" if "e" in repr(value) or "." in repr(value) else f"{value!r}.0f"
