"""Fused weights that were taken apart: where the parts lie once their shapes have changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from slim.compiler.program import Program
from slim.compiler.weights import Part


def place_parts(program: Program, changed: Iterable[str]) -> None:
    """Says anew where the weights ``changed`` lie in what was fused; forgets it where they no longer fit in there.

    What is forgotten cannot be exported under the fused name: the Program then holds the parts alone.
    """
    parts = program.facts.parts
    for base in dict.fromkeys(parts[name].base for name in changed if name in parts):
        known = {name: part for name, part in parts.items() if part.base == base}
        if all(program.weights.shape(name) == part.taken_shape for name, part in known.items()):
            continue
        placed = _placed(program, known)
        if placed is not None:
            parts.update(placed)
            continue
        del program.facts.bases[base]
        for name in known:
            del parts[name]


def _placed(program: Program, known: dict[str, Part]) -> dict[str, Part] | None:
    """The parts where they lie in a base of their size; None where they cannot lie as they did."""
    base = next(iter(known.values())).base
    shape = program.facts.bases[base][0]
    if all(part.grid == shape for part in known.values()):
        return _in_rows(program, base, known)
    return _by_turns(program, base, known)


def _in_rows(program: Program, base: str, known: dict[str, Part]) -> dict[str, Part] | None:
    """One behind the other along one axis."""
    shape, dtype = program.facts.bases[base]
    axes = {axis for part in known.values() for axis, n in enumerate(part.grid) if part.index[axis] != (0, n)}
    if len(axes) > 1:
        return None
    axis = next(iter(axes), 0)
    order = sorted(known, key=lambda name: known[name].index[axis])
    if not _adjoin([known[name].index[axis] for name in order], shape[axis]):
        return None
    sizes = [_stored_shape(program, name, known[name]) for name in order]
    others = {(*size[:axis], *size[axis + 1 :]) for size in sizes}
    if len(others) > 1:
        return None
    total = sum(size[axis] for size in sizes)
    grid = tuple(total if i == axis else n for i, n in enumerate(sizes[0]))
    placed, start = {}, 0
    for name, size in zip(order, sizes, strict=True):
        index = tuple((start, start + n) if i == axis else (0, n) for i, n in enumerate(size))
        placed[name] = replace(known[name], grid=grid, index=index, shape=size)
        start += size[axis]
    program.facts.bases[base] = (grid, dtype)
    return placed


def _by_turns(program: Program, base: str, known: dict[str, Part]) -> dict[str, Part] | None:
    """Heads of q, k and v take turns: all have lost the same heads, or none can be put back."""
    shape, dtype = program.facts.bases[base]
    sizes = {name: _stored_shape(program, name, part) for name, part in known.items()}
    shares = {(size[0] / known[name].shape[0], *size[1:]) for name, size in sizes.items()}
    heads = {part.index[0] for part in known.values()} | {(0, part.grid[0]) for part in known.values()}
    if len(shares) > 1 or len(heads) > 1:
        return None
    share, *_ = next(iter(shares))
    left, rows = round(share * next(iter(heads))[1]), round(share * shape[0])
    program.facts.bases[base] = ((rows, *shape[1:]), dtype)
    placed = {}
    for name, part in known.items():
        grid, index = (left, *part.grid[1:]), ((0, left), *part.index[1:])
        placed[name] = replace(part, grid=grid, index=index, shape=(sizes[name][0], *part.shape[1:]))
    return placed


def _adjoin(spans: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether ``spans``, in order, cover 0 to ``length`` without gap or overlap."""
    starts = [0, *(stop for _, stop in spans)]
    return starts == [*(start for start, _ in spans), length]


def _stored_shape(program: Program, name: str, part: Part) -> tuple[int, ...]:
    """As it lies in the base."""
    shape = program.weights.shape(name)
    return (*shape[:-2], shape[-1], shape[-2]) if part.transposed else shape
