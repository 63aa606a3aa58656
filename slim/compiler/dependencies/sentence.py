"""A group as a sentence that a person can check against the model: by the names and the indices that it stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.program import Program
from slim.compiler.weights import Part

_TOLD = 4  # runs of indices of one weight, at most


@dataclass(frozen=True, eq=False)
class Told:
    """What of a weight, under its own name, belongs to a group.

    Attributes:
        what: what an index is called.
        unit: int64, the unit that each index along the dimension belongs to, or -1.
    """

    weight: str
    what: str
    unit: Tensor


def told(program: Program, weight: str, dim: int, unit: Tensor, what: str) -> Told:
    """The same of the weight that the model stores, where ``weight`` is a part of it, or it turned."""
    part = program.facts.parts.get(weight)
    what = ("row", "column")[dim] if what == "index" and len(program.weights.shape(weight)) == 2 else what
    if part is None:
        return Told(weight, what, unit)
    shape = program.facts.bases[part.base][0]
    turned = part.transposed and dim >= len(shape) - 2
    at = 2 * len(shape) - 3 - dim if turned else dim
    stored = torch.full((shape[at],), -1)
    stored[_lines(part, shape, at)] = unit
    return Told(part.base, _TURNED.get(what, what) if turned else what, stored)


_TURNED = {"row": "column", "column": "row"}  # of a matrix that is stored as its transpose


def _lines(part: Part, shape: Sequence[int], at: int) -> Tensor:
    """int64: which indices of dimension ``at`` of the stored weight the part has, in its order.

    The grid's axes that divide that dimension are those whose steps are a multiple of its own, and within it.
    """
    own = math.prod(shape[at + 1 :])
    lines = torch.zeros(1, dtype=torch.long)
    for axis, (start, stop) in enumerate(part.index):
        step = math.prod(part.grid[axis + 1 :])
        if own <= step < own * shape[at]:
            lines = (lines[:, None] + torch.arange(start, stop) * (step // own)).flatten()
    return lines


def sentence(kind: str, site: str, units: int, members: Sequence[Told]) -> str:
    """neuron i of layers.0.mlp: row i of gate_proj.weight and up_proj.weight, column i of ...; 96 units"""
    merged: dict[tuple[str, str], Tensor] = {}
    for member in members:
        key = member.weight, member.what
        merged[key] = torch.maximum(merged[key], member.unit) if key in merged else member.unit
    places: dict[str, list[str]] = {}
    for (weight, what), unit in merged.items():
        places.setdefault(_indices(what, unit, units), []).append(weight.removeprefix(f"{site}."))
    parts = [f"{where} of {' and '.join(names)}" for where, names in places.items()]
    return f"{kind} i of {site}: {', '.join(parts)}; {units} units"


def _indices(what: str, unit: Tensor, units: int) -> str:
    """Which indices unit i has: a formula for each of its runs where those of all units are as far apart."""
    held: list[list[int]] = [[] for _ in range(units)]
    for index, each in enumerate(unit.tolist()):
        if each >= 0:
            held[each].append(index)
    runs = [_runs(numbers) for numbers in held]
    many = what if len(held[0]) == 1 else _PLURALS.get(what, f"{what}s")
    steps = _steps(runs)
    if steps is None:
        return f"{many} {_listed([_span(*run) for run in runs[0]])} for i = 0"
    return f"{many} {_listed([_formula(*run, step) for run, step in zip(runs[0], steps, strict=True)])}"


def _steps(runs: Sequence[list[tuple[int, int]]]) -> list[int] | None:
    """How much further on each run is from one unit to the next; None where that is not the same for all."""
    if len({len(each) for each in runs}) > 1:
        return None
    steps = [after[0] - before[0] for before, after in zip(*runs[:2], strict=True)]
    regular = all(
        each[place] == (first + step * i, last + step * i) and step > 0
        for place, ((first, last), step) in enumerate(zip(runs[0], steps, strict=True))
        for i, each in enumerate(runs)
    )
    return steps if regular else None


_PLURALS = {"entry": "entries", "matrix": "matrices", "index": "indices"}


def _listed(texts: Sequence[str]) -> str:
    shown = [*texts[:_TOLD], *["..."] * (len(texts) > _TOLD)]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _formula(first: int, last: int, step: int) -> str:
    """16 i + 64 to + 79, of a run that is ``step`` further on in each unit."""
    at = (f"{step} i" if step != 1 else "i") + (f" + {first}" if first else "")
    return at if first == last else f"{at} to + {last}"


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 5] as (0, 2), (5, 5)."""
    held = set(numbers)
    starts = [n for n in numbers if n - 1 not in held]
    ends = [n for n in numbers if n + 1 not in held]
    return list(zip(starts, ends, strict=True))
