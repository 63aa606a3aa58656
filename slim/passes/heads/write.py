"""Writing merged heads into a Program: weights, shapes, types, the model's configuration, and where parts lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from slim.compiler.program import Program
from slim.compiler.weights import Part
from slim.passes.heads.find import RESHAPES, Heads, Projection
from slim.passes.heads.layer import Made

# What configurations call the number of kv heads.
_FIELDS = ("num_key_value_heads", "num_kv_heads")


def write_heads(program: Program, heads: Heads, made: Made, kv_heads: int) -> None:
    """Puts new weights in place; keys and values then have ``kv_heads`` heads, and every type says so."""
    for name, value in made.items():
        program.weights[name] = value.contiguous()
        node = program.weight_node(name)
        node.meta["val"] = program.typer.value(node, program.weights)
    for one in (heads.k, heads.v):
        for node in one.path:
            if node.target in RESHAPES:
                _say_heads(node, one, kv_heads)
        for node in (one.linear, *one.path):
            node.meta["val"] = program.typer.value(node, program.weights)


def _say_heads(node: fx.Node, one: Projection, kv_heads: int) -> None:
    """The reshape that cuts rows into heads may name how many there are."""
    shape = list(node.args[1])  # type: ignore[arg-type]
    source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    if len(shape) == 4 and len(source) < 4 and shape[2] == one.heads:
        shape[2] = kv_heads
    elif shape[-1] == one.heads * one.width:
        shape[-1] = kv_heads * one.width
    node.args = (node.args[0], shape, *node.args[2:])


def write_config(program: Program, before: set[int], after: set[int]) -> str | None:
    """Keeps the model's configuration true where all layers have one number of kv heads; a note where it cannot be.

    Args:
        before, after: the numbers of kv heads that layers had, and have.
    """
    config = program.facts.config
    if config is None:
        return None
    fields = [name for name in _FIELDS if name in config and {config[name]} == before]
    if len(after) > 1:
        return "its layers differ in kv heads, which plain transformers cannot say: such a model exports to slim alone"
    if not fields:
        return "its configuration has no field for kv heads: plain transformers cannot hold the result"
    for name in fields:
        config[name] = next(iter(after))
    return None


def write_parts(program: Program, heads: Heads) -> None:
    """Says anew where q, k and v lie in a weight that was fused; forgets it where they no longer fit in there."""
    biases = [one.bias for one in (heads.q, heads.k, heads.v)]
    for names in ([one.weight for one in (heads.q, heads.k, heads.v)], [name for name in biases if name is not None]):
        known = {name: program.facts.parts[name] for name in names if name in program.facts.parts}
        if all(program.weights.shape(name) == part.taken_shape for name, part in known.items()):
            continue
        placed = _placed(program, known)
        for base in {part.base for part in known.values()}:
            if placed is None and not _others(program, base, known):
                del program.facts.bases[base]
        for name in known:
            if placed is None:
                del program.facts.parts[name]
            else:
                program.facts.parts[name] = placed[name]


def _others(program: Program, base: str, known: dict[str, Part]) -> bool:
    return any(part.base == base for name, part in program.facts.parts.items() if name not in known)


def _placed(program: Program, known: dict[str, Part]) -> dict[str, Part] | None:
    """The parts, one behind the other as before, in a base that is as long as they are; None where that cannot be."""
    bases = {part.base for part in known.values()}
    base = next(iter(bases))
    shape, dtype = program.facts.bases[base]
    axes = {axis for part in known.values() for axis, n in enumerate(part.grid) if part.index[axis] != (0, n)}
    whole = all(part.grid == shape for part in known.values())  # otherwise heads of q, k and v take turns
    if len(bases) > 1 or len(axes) != 1 or not whole or _others(program, base, known):
        return None
    axis = next(iter(axes))
    order = sorted(known, key=lambda name: known[name].index[axis])
    if not _adjoin([known[name].index[axis] for name in order], shape[axis]):
        return None
    lengths = [_length(program, name, known[name], axis) for name in order]
    total = sum(lengths)
    grid = tuple(total if i == axis else n for i, n in enumerate(shape))
    placed, start = {}, 0
    for name, length in zip(order, lengths, strict=True):
        index = tuple((start, start + length) if i == axis else (0, n) for i, n in enumerate(shape))
        placed[name] = replace(known[name], grid=grid, index=index, shape=tuple(b - a for a, b in index))
        start += length
    program.facts.bases[base] = (grid, dtype)
    return placed


def _adjoin(spans: Sequence[tuple[int, int]], length: int) -> bool:
    """Whether ``spans``, in order, cover 0 to ``length`` without gap or overlap."""
    starts = [0, *(stop for _, stop in spans)]
    return starts == [*(start for start, _ in spans), length]


def _length(program: Program, name: str, part: Part, axis: int) -> int:
    shape = program.weights.shape(name)
    stored = (*shape[:-2], shape[-1], shape[-2]) if part.transposed else shape
    return stored[axis]
