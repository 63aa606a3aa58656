"""Scalars as Triton text: what a region computes for one element, written for a block of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from slim.codegen.regions.scalars import BOOL, F32, I64, Const, Gather, Iota, Lane, Load, Op, Scalar, SizeOf, walk
from slim.codegen.regions.views import Size, View
from slim.codegen.triton.writer import Writer

COMPUTED = {F32: "tl.float32", I64: "tl.int64", BOOL: "tl.int1"}

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "land": "&", "lor": "|", "lxor": "^", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
    "truncdiv": "//",
}  # fmt: skip
_CALLS = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sqrt": "tl.sqrt_rn", "sin": "tl.sin",
    "cos": "tl.cos", "erf": "tl.erf", "sigmoid": "tl.sigmoid", "floor": "tl.floor", "ceil": "tl.ceil", "abs": "tl.abs",
    "max": "tl.maximum", "min": "tl.minimum", "where": "tl.where",
}  # fmt: skip
# Those of functions.py.
_FUNCTIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "tanh": "tanh", "log1p": "log1p", "expm1": "expm1",
    "round": "round_even", "trunc": "trunc", "pow": "power", "sign": "sign", "floordiv": "floor_div",
}  # fmt: skip
_FORMS = {
    "neg": "(-{0})", "lnot": "({0} == 0)", "not": "(~{0})", "rsqrt": "(1.0 / tl.sqrt_rn({0}))",
    "reciprocal": "(1.0 / {0})",
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """The indices of one dimension that a program works on.

    Attributes:
        name: the variable that holds them: a scalar, or a block shaped to broadcast against those of other axes.
        mask: the variable that says which of them there are, of the same shape; None where all are.
    """

    name: str
    mask: str | None = None


@dataclass(frozen=True)
class Text:
    """A variable or literal, and the axes that it varies along."""

    text: str
    axes: frozenset[Axis] = frozenset()
    plain: bool = False  # a literal or a size, which has no methods


class Index:
    """The indices of a shape: an axis for each group of neighbouring dimensions that are walked as one.

    A group without an axis is a dimension of size 1.
    """

    def __init__(self, axes: Sequence[Axis | None], groups: Sequence[Sequence[int]] | None = None) -> None:
        self.axes = axes
        self.groups = groups if groups is not None else [[d] for d in range(len(axes))]

    def terms(self, strides: Sequence[Size]) -> list[tuple[Axis, Size]]:
        """(axis, stride) of each part of an address that is not always 0."""
        found = []
        for axis, group in zip(self.axes, self.groups, strict=True):
            stride = strides[group[-1]] if group else 0
            if axis is not None and stride != 0:
                found.append((axis, stride))
        return found


class ScalarText:
    """Writes trees over one index.

    Attributes:
        lines: the statements so far; a caller may take them and go on, what they named stays known.
    """

    def __init__(self, writer: Writer, index: Index, lanes: Mapping[int, Text] | None = None, tag: str = "") -> None:
        self.writer, self.index = writer, index
        self.lanes = dict(lanes or {})
        self.lines: list[str] = []
        self._tag = tag  # tells the variables of two texts in one kernel apart
        self._named: dict[str, str] = {}
        self._texts: dict[Scalar, Text] = {}  # by identity, and kept alive: an id may be used again

    def write(self, body: Scalar) -> Text:
        """What holds ``body``; the statements it needs are added to ``lines``."""
        for scalar in walk(body):
            if scalar not in self._texts:
                self._texts[scalar] = self._one(scalar)
        return self._texts[body]

    def fresh(self) -> None:
        """Begins again with no variables, in another scope over the same index."""
        self.lines, self._named, self._texts = [], {}, {}

    def address(self, view: View) -> Text:
        """A pointer to the elements of ``view`` at the index."""
        return self._place(view, [])

    def store(self, view: View, value: str) -> str:
        """The statement that stores ``value``."""
        place = self.address(view)
        mask = mask_of(place.axes)
        return f"tl.store({place.text}, {value}{f', mask={mask}' if mask else ''})"

    # -- one scalar ----------------------------------------------------------------------------------------------------

    def _one(self, scalar: Scalar) -> Text:
        if isinstance(scalar, Const):
            return Text(literal(scalar), plain=True)
        if isinstance(scalar, SizeOf):
            return Text(self.writer.size(scalar.size), plain=True)
        if isinstance(scalar, Lane):
            return self.lanes[id(scalar.anchor)]
        if isinstance(scalar, Op):
            return self._operation(scalar, [self._texts[arg] for arg in scalar.args])
        if isinstance(scalar, Iota):
            return self._iota(scalar)
        assert isinstance(scalar, (Load, Gather))
        terms = []
        if isinstance(scalar, Gather):
            terms = [(self._inside(self._texts[index], count), stride) for index, stride, count in scalar.terms]
        return self._load(self._place(scalar.view, terms), scalar)

    def _load(self, place: Text, scalar: Load | Gather) -> Text:
        mask = mask_of(place.axes)
        other = f", mask={mask}, other=0" if mask else ""
        kind = COMPUTED[scalar.dtype]
        convert = " != 0" if scalar.dtype == BOOL else f".to({kind})"
        return self._name(f"tl.load({place.text}{other}){convert}", place.axes)

    def _place(self, view: View, gathered: Sequence[tuple[Text, Size]]) -> Text:
        terms = self.index.terms(view.strides)
        axes = frozenset(axis for axis, _ in terms).union(*(text.axes for text, _ in gathered))
        parts = [self.writer.pointer(view.buffer)]
        if view.offset != 0:
            parts.append(self.writer.size(view.offset))
        parts += [self._times(axis.name, stride) for axis, stride in terms]
        parts += [self._times(text.text, stride) for text, stride in gathered]
        return Text(" + ".join(parts), axes)

    def _times(self, name: str, stride: Size) -> str:
        return name if stride == 1 else f"{name} * {self.writer.size(stride)}"

    def _inside(self, at: Text, count: Size | None) -> Text:
        """An index that is safe to read at; one out of range is noted, and 0 taken."""
        if count is None:
            return at
        good = self._name(f"({at.text} >= 0) & ({at.text} < {self.writer.size(count)})", at.axes)
        masks = [f"({good.text} == 0)", *([mask_of(at.axes)] if mask_of(at.axes) else [])]
        fault = f"tl.store({self.writer.pointer('fault')} + {at.text} * 0, 1, mask={' & '.join(masks)})"
        if fault not in self.lines:
            self.lines.append(fault)
        return self._name(f"tl.where({good.text}, {at.text}, 0)", at.axes)

    def _iota(self, scalar: Iota) -> Text:
        terms = self.index.terms(scalar.map.strides)
        offset = [] if scalar.map.offset == 0 else [self.writer.size(scalar.map.offset)]
        parts = [*offset, *(self._times(axis.name, stride) for axis, stride in terms)]
        if not terms:
            return Text(offset[0] if offset else "0", plain=True)
        return self._name(f"({' + '.join(parts)})", frozenset(axis for axis, _ in terms))

    def _operation(self, scalar: Op, args: list[Text]) -> Text:
        axes = frozenset().union(*(arg.axes for arg in args))
        if scalar.name == "cast":
            return self._cast(scalar, args[0])
        texts = [arg.text for arg in args]
        if all(arg.plain for arg in args):  # Triton's functions want a tensor
            kind = COMPUTED[scalar.args[-1].dtype]
            texts[-1] = f"tl.full((), {texts[-1]}, {kind})"
        return self._name(self._written(scalar, texts), axes)

    def _written(self, scalar: Op, args: list[str]) -> str:
        name = scalar.name
        if name == "mod":
            kind = "floor_mod" if scalar.dtype == I64 else "floor_mod_float"
            return f"{self.writer.function(kind)}({args[0]}, {args[1]})"
        if name in _INFIX:
            return f"({args[0]} {_INFIX[name]} {args[1]})"
        if name in _CALLS:
            return f"{_CALLS[name]}({', '.join(args)})"
        if name in _FUNCTIONS:
            return f"{self.writer.function(_FUNCTIONS[name])}({', '.join(args)})"
        return _FORMS[name].format(*args)

    def _cast(self, scalar: Op, arg: Text) -> Text:
        if arg.plain:
            text = f"({arg.text} + 0.0)" if scalar.dtype == F32 else arg.text
            return Text(f"({arg.text} != 0)" if scalar.dtype == BOOL else text, plain=True)
        if scalar.dtype == BOOL:
            return self._name(f"({arg.text} != 0)", arg.axes)
        return self._name(f"{arg.text}.to({COMPUTED[scalar.dtype]})", arg.axes)

    def _name(self, text: str, axes: Iterable[Axis]) -> Text:
        if text not in self._named:
            self._named[text] = f"v{len(self._named)}{self._tag}"
            self.lines.append(f"{self._named[text]} = {text}")
        return Text(self._named[text], frozenset(axes))


def mask_of(axes: Iterable[Axis]) -> str:
    """Which of the elements along ``axes`` there are; "" where all are."""
    return " & ".join(sorted({axis.mask for axis in axes if axis.mask}))


def literal(scalar: Const) -> str:
    """A constant as Python writes it."""
    if scalar.dtype == F32:
        return number(float(scalar.value))
    return str(bool(scalar.value) if scalar.dtype == BOOL else int(scalar.value))


def number(value: float) -> str:
    """A float32 literal; what is larger than any is infinite."""
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value) or abs(value) > 3.4028235677973366e38:
        return f'float("{"-" if value < 0 else ""}inf")'
    return repr(value)
