"""What each pointwise operation of the dialect computes for one element: a table from ATen to scalars."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from slim.codegen.regions.scalars import BOOL, F32, I64, Const, Op, Scalar, cast

aten = torch.ops.aten

# (operands as scalars, the options that are no tensors, type of the result) -> scalar
Builder = Callable[[list[Scalar], dict[str, Any], torch.dtype], Scalar]


def const(value: float | int | bool, dtype: torch.dtype) -> Const:
    kinds: dict[torch.dtype, Callable[[Any], Any]] = {F32: float, I64: int, BOOL: bool}
    return Const(kinds[dtype](value), dtype)


def op(name: str, *args: Scalar, dtype: torch.dtype | None = None) -> Op:
    return Op(name, args, dtype or args[0].dtype)


def promoted(args: list[Scalar]) -> torch.dtype:
    """The type in which numbers of several types are compared."""
    return next((kind for kind in (F32, I64) if any(arg.dtype == kind for arg in args)), BOOL)


def _same_type(name: str) -> Builder:
    """An operation whose operands have the type of its result."""
    return lambda args, options, dtype: op(name, *(cast(arg, dtype) for arg in args), dtype=dtype)


def _comparison(name: str) -> Builder:
    def build(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
        kind = promoted(args)
        return op(name, *(cast(arg, kind) for arg in args), dtype=BOOL)

    return build


def _logical(name: str) -> Builder:
    return lambda args, options, dtype: cast(op(name, *(cast(arg, BOOL) for arg in args), dtype=BOOL), dtype)


def _bitwise(name: str) -> Builder:
    """On booleans these are the logical ones."""
    return lambda args, options, dtype: op(name if dtype != BOOL else f"l{name}", *(cast(a, dtype) for a in args))


def _scaled(name: str) -> Builder:
    """add and sub, with their ``alpha``."""

    def build(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
        a, b = (cast(arg, dtype) for arg in args[:2])
        alpha = options.get("alpha", 1)
        return op(name, a, b if alpha == 1 else op("mul", b, const(alpha, dtype)))

    return build


def _divide(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    a, b = args[:2]
    mode = options.get("rounding_mode")
    if mode is None:
        return op("div", cast(a, F32), cast(b, F32))
    if dtype == I64:
        return op("floordiv" if mode == "floor" else "truncdiv", cast(a, I64), cast(b, I64))
    return op("floor" if mode == "floor" else "trunc", op("div", cast(a, F32), cast(b, F32)))


def _power(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    a, b = (cast(arg, dtype) for arg in args[:2])
    if isinstance(b, Const) and b.value in (2, 3, 0.5, -0.5):
        if b.value in (2, 3):
            square = op("mul", a, a)
            return square if b.value == 2 else op("mul", square, a)
        return op("sqrt" if b.value == 0.5 else "rsqrt", a)
    return op("pow", a, b)


def _gelu(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    return op("gelu" if options.get("approximate", "none") == "none" else "gelu_tanh", args[0])


def _clamp(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    x = cast(args[0], dtype)
    for name, bound in (("max", options.get("min")), ("min", options.get("max"))):
        if bound is not None:
            x = op(name, x, cast(bound, dtype) if isinstance(bound, Scalar) else const(bound, dtype))
    return x


def _where(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    return op("where", cast(args[0], BOOL), *(cast(arg, dtype) for arg in args[1:3]), dtype=dtype)


def _masked_fill(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    return _where([args[1], args[2], args[0]], options, dtype)


def _softplus(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    beta, threshold = (const(options.get(k, d), F32) for k, d in (("beta", 1.0), ("threshold", 20.0)))
    scaled = op("mul", args[0], beta)
    soft = op("div", op("log1p", op("exp", scaled)), beta)
    return op("where", op("gt", scaled, threshold, dtype=BOOL), args[0], soft, dtype=F32)


def _leaky_relu(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    slope = const(options.get("negative_slope", 0.01), F32)
    return op("where", op("gt", args[0], const(0, F32), dtype=BOOL), args[0], op("mul", args[0], slope), dtype=F32)


def _square(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    return op("mul", cast(args[0], dtype), cast(args[0], dtype))


def _reversed(builder: Builder) -> Builder:
    return lambda args, options, dtype: builder([args[1], args[0]], options, dtype)


def _plain(name: str) -> Builder:
    """A function of one real number."""
    return lambda args, options, dtype: op(name, cast(args[0], F32))


def _sign_kept(name: str) -> Builder:
    """abs, neg, floor, ...: on integers, rounding is the identity."""

    def build(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
        if dtype != F32 and name in ("floor", "ceil", "round", "trunc"):
            return cast(args[0], dtype)
        return op(name, cast(args[0], dtype))

    return build


def _identity(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    return cast(args[0], dtype)


def _addcmul(args: list[Scalar], options: dict[str, Any], dtype: torch.dtype) -> Scalar:
    a, b, c = (cast(arg, dtype) for arg in args[:3])
    product = op("mul", b, c)
    value = options.get("value", 1)
    return op("add", a, product if value == 1 else op("mul", product, const(value, dtype)))


_BY_NAME: dict[str, Builder] = {
    "add": _scaled("add"), "sub": _scaled("sub"), "rsub": _reversed(_scaled("sub")), "subtract": _scaled("sub"),
    "mul": _same_type("mul"), "multiply": _same_type("mul"), "div": _divide, "divide": _divide, "pow": _power,
    "maximum": _same_type("max"), "minimum": _same_type("min"), "remainder": _same_type("mod"),
    "floor_divide": lambda args, options, dtype: _divide(args, {"rounding_mode": "floor"}, dtype),
    "eq": _comparison("eq"), "ne": _comparison("ne"), "lt": _comparison("lt"), "le": _comparison("le"),
    "gt": _comparison("gt"), "ge": _comparison("ge"),
    "logical_and": _logical("land"), "logical_or": _logical("lor"), "logical_not": _logical("lnot"),
    "logical_xor": _logical("lxor"),
    "bitwise_and": _bitwise("and"), "bitwise_or": _bitwise("or"), "bitwise_xor": _bitwise("xor"),
    "__and__": _bitwise("and"), "__or__": _bitwise("or"), "bitwise_not": _bitwise("not"),
    "where": _where, "masked_fill": _masked_fill, "clamp": _clamp, "clamp_min": _clamp, "clamp_max": _clamp,
    "neg": _sign_kept("neg"), "abs": _sign_kept("abs"), "floor": _sign_kept("floor"), "ceil": _sign_kept("ceil"),
    "round": _sign_kept("round"), "trunc": _sign_kept("trunc"), "sign": _sign_kept("sign"), "square": _square,
    "relu": lambda args, options, dtype: op("max", args[0], const(0, dtype)),
    "gelu": _gelu, "softplus": _softplus, "leaky_relu": _leaky_relu, "addcmul": _addcmul,
    "_to_copy": _identity, "clone": _identity, "alias": _identity, "detach": _identity, "contiguous": _identity,
    "lift_fresh_copy": _identity, "copy": lambda args, options, dtype: cast(args[1], dtype),
}  # fmt: skip
_BY_NAME |= {
    name: _plain(name)
    for name in (
        "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "rsqrt", "tanh", "erf", "sigmoid", "silu", "sin",
        "cos", "reciprocal",
    )
}  # fmt: skip


def builder(target: Any) -> Builder | None:
    """What a node of ``target`` computes for an element; None where it is not pointwise, or not known."""
    name = getattr(target, "_schema", None)
    if name is None or not name.name.startswith("aten::") or name.is_mutable:
        return None
    return _BY_NAME.get(name.name.removeprefix("aten::"))
