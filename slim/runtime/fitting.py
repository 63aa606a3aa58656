"""Back to the original architecture, as transformers has it: every weight under its name, whole, and of its shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from slim import errors
from slim.compiler.config import empty_model
from slim.compiler.program import Facts
from slim.compiler.weights import Part
from slim.runtime.architecture import rebuild_generation_config


class Typed(Protocol):
    """A tensor, or what can become one: it says what it is."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


Value = TypeVar("Value", bound=Typed)


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made anew each time it is read: a ``Deferred`` weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    def load(self) -> Tensor:
        return self.make()


def refuse(format: str, reason: str) -> NoReturn:
    """Raises ExportUnsupported."""
    raise errors.ExportUnsupported(format=format, reason=reason)


def architecture(facts: Facts, format: str) -> Any:
    """The transformers model to export into, without weights, generation configuration included.

    Raises:
        ExportUnsupported: for a model that is not transformers' own.
    """
    if facts.config is None:
        refuse(format, f"{facts.architecture or 'the model'} is not one of transformers' own")
    try:
        model = empty_model(facts)
    except errors.UnsupportedModel as error:
        raise errors.ExportUnsupported(format=format, reason=error.reason) from error
    if facts.generation is not None:
        model.generation_config = rebuild_generation_config(facts)
    return model


# -- fused weights -----------------------------------------------------------------------------------------------------


def originals(facts: Facts, values: Mapping[str, Lazy], format: str) -> dict[str, Lazy]:
    """Every weight under the name and in the layout it had before the lift; fused ones are put together again.

    Raises:
        ExportUnsupported: where a fused weight is not whole.
    """
    state: dict[str, Lazy] = {}
    for name, names in sources(facts, values).items():
        if name not in facts.bases:
            state[name] = values[name]
            continue
        shape, dtype = facts.bases[name]
        pieces = [(facts.parts[part], values[part]) for part in names]
        check_whole(name, shape, dict(zip(names, pieces, strict=True)), format)
        state[name] = Lazy(dtype, shape, lambda s=shape, d=dtype, p=pieces: joined(s, d, p))  # type: ignore[misc]
    return state


def sources(facts: Facts, names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Original name -> the weights of the Program that it is made of."""
    found: dict[str, list[str]] = {}
    for name in names:
        part = facts.parts.get(name)
        found.setdefault(name if part is None else part.base, []).append(name)
    return found


def check_whole(base: str, shape: tuple[int, ...], pieces: Mapping[str, tuple[Part, Typed]], format: str) -> None:
    """Raises ExportUnsupported unless the pieces have the shapes of their places, and these are all of ``base``."""
    missing = math.prod(shape)
    for name, (part, value) in pieces.items():
        if tuple(value.shape) != part.taken_shape:
            refuse(format, f"{name} is {list(value.shape)}, and its place in {base} is {list(part.taken_shape)}")
        missing -= math.prod(part.taken_shape)
    if missing:
        refuse(format, f"{missing:,} numbers of {base} are no longer part of the program")


def joined(shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[tuple[Part, Lazy]]) -> Tensor:
    """The pieces of a fused weight in their places."""
    whole = torch.zeros(shape, dtype=dtype)
    for part, value in pieces:
        part.put(whole, value.load().to(dtype))
    return whole


# -- names and shapes --------------------------------------------------------------------------------------------------


def fitted(
    model: Any, facts: Facts, state: Mapping[str, Value], format: str, full: Callable[[tuple[int, ...], float], Value]
) -> dict[str, Value]:
    """``state`` with tied and retired names added, once every name and shape is what ``model`` has.

    Args:
        full: makes the constant, of a shape, that stands for a weight that was folded away.

    Raises:
        ExportUnsupported: naming what is missing, left over, or of another shape.
    """
    expected = model.state_dict(keep_vars=True)
    same = tied_names(expected)
    found: dict[str, Value] = {}
    for name, meta in expected.items():
        names = (name, facts.tied.get(name, name), *same[name])
        value = next((state[other] for other in names if other in state), None)
        if value is None and name in facts.retired:
            value = full(tuple(meta.shape), facts.retired[name])
        if value is None:
            refuse(format, f"{name} {list(meta.shape)} is no longer part of the program{_why_gone(facts, name)}")
        if tuple(value.shape) != tuple(meta.shape):
            refuse(format, f"{name} is {list(value.shape)}, and the configuration says {list(meta.shape)}")
        found[name] = value
    known = set(expected) | facts.constants | set(facts.tied.values())
    left = [name for name in state if name not in known]
    if left:
        refuse(format, f"the architecture has no place for {', '.join(left[:5])}{' and others' * (len(left) > 5)}")
    return found


def _why_gone(facts: Facts, base: str) -> str:
    """Which passes put other weights in place of ``base``, or of parts of it; nothing where none did."""
    names = [base, *(name for name, part in facts.parts.items() if part.base == base)]
    passes = dict.fromkeys(facts.replaced[name] for name in names if name in facts.replaced)
    return f": {' and '.join(passes)} put others in its place" if passes else ""


def tied_names(expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Each name of a state dict -> the names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    return {name: groups[id(tensor)] for name, tensor in expected.items()}


def main_dtype(values: Mapping[str, Typed]) -> torch.dtype:
    """The floating-point type of most numbers: what a folded weight had."""
    sizes: dict[torch.dtype, int] = {}
    for value in values.values():
        if value.dtype.is_floating_point:
            sizes[value.dtype] = sizes.get(value.dtype, 0) + math.prod(value.shape)
    return max(sizes, key=lambda dtype: sizes[dtype])
