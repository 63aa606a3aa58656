"""Values of pass options: whether one fits its declared type, and how one is written in a pipeline text."""

from __future__ import annotations

import math
from collections.abc import Collection
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


class Unfit(Exception):
    """A value does not fit its type: what would, in words and, where they can be listed, as values."""

    def __init__(self, value: object, wanted: str, known: Collection[str] = ()) -> None:
        super().__init__(f"{literal(value)} is not {wanted}")
        self.value = value
        self.wanted = wanted
        self.known = known


def fit(value: Any, kind: Any) -> Any:
    """``value`` as the type ``kind``: lists become tuples and integers become floats where those are declared.

    ``kind`` is a type as dataclass fields declare them: bool, int, float, str, None, Literal, ``tuple[X, ...]``,
    and unions of them.

    Raises:
        Unfit: where it is something else.
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _fit_one_of(value, get_args(kind))
    if origin is Literal:
        for choice in get_args(kind):
            if value == choice and type(value) is type(choice):
                return choice
        raise Unfit(value, _wanted(kind), choices(kind))
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(fit(item, get_args(kind)[0]) for item in value)
    if kind is float and _is_number(value) and math.isfinite(value):
        return float(value)
    if kind is int and _is_number(value) and isinstance(value, int):
        return value
    if kind in (bool, str, NoneType) and isinstance(value, kind):
        return value
    raise Unfit(value, _wanted(kind))


def _fit_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return fit(value, kind)
        except Unfit:
            continue
    listed = all(kind is NoneType or choices(kind) for kind in kinds)
    raise Unfit(value, _wanted_of(kinds), [choice for kind in kinds for choice in choices(kind)] if listed else ())


def _wanted_of(kinds: tuple[Any, ...]) -> str:
    """One of several types in words: ``a finite number, a list of integers or "auto"``."""
    words = [_wanted(kind) for kind in kinds if not (kind is int and float in kinds)]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choices(kind: Any) -> list[str]:
    """What can be listed of the values of ``kind``: those of its Literals."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if get_origin(kind) in (Union, UnionType):
        return [choice for part in get_args(kind) for choice in choices(part)]
    return []


_PLURALS = {int: "integers", float: "finite numbers", bool: "True and False", str: "strings"}


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        shown = ", ".join(literal(choice) for choice in get_args(kind))
        return f"one of {shown}" if len(get_args(kind)) > 1 else shown
    if get_origin(kind) is tuple:
        return f"a list of {_PLURALS[get_args(kind)[0]]}"
    words = {int: "an integer", float: "a finite number", bool: "True or False", str: "a string", NoneType: "None"}
    return words[kind]


def show_kind(kind: Any) -> str:
    """A declared type as a user reads it: ``"int8" | "int4" | None``."""
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(show_kind(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(literal(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"[{show_kind(get_args(kind)[0])}, ...]"
    return "None" if kind is NoneType else str(kind.__name__)


def literal(value: object) -> str:
    """``value`` as pipeline text: a Python literal, strings in double quotes where they can be."""
    if isinstance(value, tuple):
        return f"[{', '.join(literal(item) for item in value)}]"
    text = repr(value)
    if isinstance(value, str) and '"' not in text:
        return f'"{text[1:-1]}"'  # repr chose single quotes, so there is no quote of either kind inside
    return text
