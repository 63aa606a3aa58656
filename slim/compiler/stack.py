"""The blocks that a model is a stack of, read off the graph: alike, one behind the other, one value between each two.

>>> blocks = find_blocks(program)
>>> take_out(program, blocks[4:6])  # the sixth now reads what the third gives; names, caches and settings follow
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.types import SIZE_OPS
from slim.compiler.uses import ATTENTION, EMBEDDING, EXPERTS, LINEAR

_NUMBERED = re.compile(r"((?:[^.]*\.)*?)(\d+)\.")  # the first number in a name, and what is before it
_SMALL = 1 << 14  # numbers of a table that is compared by what it holds
_WORKS = frozenset({LINEAR, EXPERTS, *ATTENTION})


@dataclass(frozen=True, eq=False)
class Block:
    """A stretch of the graph between two values of one type, with a way past all of its matrices.

    Attributes:
        entry, exit: what it reads, but for masks, positions and tables that all blocks share; and what it makes.
        nodes: what it computes of ``entry``, in order.
        weights: those that nothing else reads.
        prefix, numbers: what their names, constants aside, begin with, and the numbers behind; None where they differ.
    """

    entry: fx.Node
    exit: fx.Node
    nodes: tuple[fx.Node, ...]
    weights: tuple[str, ...]
    prefix: str | None
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        if self.prefix is None:
            return self.exit.name
        return ", ".join(f"{self.prefix}{number}" for number in self.numbers)


def find_blocks(program: Program) -> list[Block]:
    """The longest row of blocks that compute alike, in order; none where no two do.

    Where an encoder feeds every layer of a decoder, or a layer all the later ones, values pass by: those have none.
    """
    main = _stream(program)
    cuts = list(_cuts(program, main))
    stretches = _stretches(main, cuts)
    found = _repeated([tuple(str(node.target) for node in stretch) for stretch in stretches])
    if found is None:
        return []
    start, period, times, slack = found
    owners = _Owners(program, main)
    rows = [
        [_block(program, owners, cuts, stretches, first + turn * period, period) for turn in range(times)]
        for first in range(start, start + slack + 1)
    ]
    good = [row for row in rows if all(map(_is_residual, row))]
    named = [row for row in good if _are_named(row)]
    return (named or good or [[]])[-1 if not named else 0]


def _stream(program: Program) -> dict[fx.Node, None]:
    """The values that come of tokens or of inputs that are no numbers of tokens, in order: no masks, no positions."""
    main: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            begins = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        else:
            begins = node.target is EMBEDDING
        follows = node.op == "call_function" and any(source in main for source in node.all_input_nodes)
        if (begins or follows) and node.target not in SIZE_OPS:
            main[node] = None
    return main


def _cuts(program: Program, main: dict[fx.Node, None]) -> Iterator[fx.Node]:
    """The values that all of the stream goes through."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    furthest = -1
    for node in main:
        if furthest <= order[node] and isinstance(node.meta["val"], Tensor):
            yield node
        furthest = max([furthest, *(order[user] for user in node.users)])


def _stretches(main: dict[fx.Node, None], cuts: Sequence[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """What is computed between each cut and the next, that one included."""
    found: list[list[fx.Node]] = []
    ends = set(cuts)
    for node in main:
        if found:
            found[-1].append(node)
        if node in ends:
            found.append([])
    return [tuple(stretch) for stretch in found[:-1]]


def _repeated(marks: Sequence[tuple[str, ...]]) -> tuple[int, int, int, int] | None:
    """(start, period, times, slack) of the longest row of equal runs of ``marks``, the shortest runs of those.

    Slack is by how many marks the row may begin later.
    """
    known: dict[tuple[str, ...], int] = {}
    numbers = torch.tensor([known.setdefault(mark, len(known)) for mark in marks])
    best: tuple[int, int, int, int] | None = None
    for period in range(1, len(numbers) // 2 + 1):
        equal = (numbers[period:] == numbers[:-period]).tolist()
        for start, length in _runs(equal):
            times = length // period + 1
            if times > 1 and (best is None or times * period > best[1] * best[2]):
                best = start, period, times, length % period
    return best


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, length) of each run of True."""
    start = None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            yield start, index - start
            start = None


class _Owners:
    """Which nodes of the stream read each weight, at once or by way of what is not of the stream."""

    def __init__(self, program: Program, main: dict[fx.Node, None]) -> None:
        self.main = main
        self.readers = {str(node.target): self._reached(node) for node in program.graph.nodes if node.op == "get_attr"}

    def _reached(self, weight: fx.Node) -> set[fx.Node]:
        found, waiting, seen = set[fx.Node](), [weight], {weight}
        while waiting:
            for user in waiting.pop().users:
                if user in self.main:
                    found.add(user)
                elif user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return found

    def of(self, nodes: Sequence[fx.Node]) -> list[str]:
        """The weights that only ``nodes`` read."""
        held = set(nodes)
        return [name for name, readers in self.readers.items() if readers and readers <= held]


def _block(
    program: Program,
    owners: _Owners,
    cuts: Sequence[fx.Node],
    stretches: Sequence[tuple[fx.Node, ...]],
    first: int,
    period: int,
) -> Block:
    nodes = tuple(node for stretch in stretches[first : first + period] for node in stretch)
    weights = tuple(owners.of(nodes))
    named = [name for name in weights if name not in program.facts.constants]  # tables lie where they like
    places = {(found[1], int(found[2])) for name in named if (found := _NUMBERED.match(name))}
    prefixes = {prefix for prefix, _ in places}
    whole = len(prefixes) == 1 and all(name.startswith(next(iter(prefixes))) for name in named)
    prefix = next(iter(prefixes)) if whole else None
    numbers = tuple(sorted(number for _, number in places)) if whole else ()
    return Block(cuts[first], cuts[first + period], nodes, weights, prefix, numbers)


def _is_residual(block: Block) -> bool:
    """Whether the block multiplies by something, and its entry reaches its exit past all of that, in the same shape."""
    if not any(node.target in _WORKS for node in block.nodes):
        return False
    a, b = block.entry.meta["val"], block.exit.meta["val"]
    if a.dtype != b.dtype or str(tuple(a.shape)) != str(tuple(b.shape)):
        return False
    reached = {block.entry}
    for node in block.nodes:
        if node.target not in _WORKS and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    return block.exit in reached


def _are_named(row: Sequence[Block]) -> bool:
    """Whether each block has numbers of its own, as many as the others, behind one prefix."""
    numbers = [number for block in row for number in block.numbers]
    return (
        len({block.prefix for block in row}) == 1
        and row[0].prefix is not None
        and len({len(block.numbers) for block in row}) == 1
        and len(set(numbers)) == len(numbers)
    )


# -- taking out --------------------------------------------------------------------------------------------------------


def bypass(blocks: Sequence[Block], order: dict[fx.Node, fx.Node] | None = None) -> None:
    """Lets whatever reads the exits of ``blocks`` read their entries; ``order``: these nodes in a copy of the graph."""
    for block in reversed(blocks):
        entry, exit = (block.entry, block.exit) if order is None else (order[block.entry], order[block.exit])
        exit.replace_all_uses_with(entry)


def take_out(program: Program, blocks: Sequence[Block]) -> None:
    """Takes ``blocks``, in the order of the graph, out for good; the layers that are left are counted anew.

    Weights, ``facts`` (the configuration aside) and paths of modules get the numbers of the layers that are left, and
    attention nodes their places in the cache.
    """
    layers = _layers(program)
    bypass(blocks)
    program.clean()
    left = _layers(program)
    if layers == list(range(len(layers))):
        for node in program.attention_nodes():
            node.kwargs = {**node.kwargs, "layer": left.index(_layer(node))}
    if blocks and blocks[0].prefix is not None:
        _Renaming(blocks[0].prefix, sorted(n for block in blocks for n in block.numbers)).apply(program)


def _layers(program: Program) -> list[int]:
    return sorted({_layer(node) for node in program.attention_nodes()})


def _layer(attention: fx.Node) -> int:
    return int(attention.kwargs["layer"])  # type: ignore[arg-type]


class _Renaming:
    """Names without the numbers that are gone."""

    def __init__(self, prefix: str, gone: Sequence[int]) -> None:
        self.prefix, self.gone = prefix, gone

    def name(self, name: str) -> str:
        """With its new number; what lay in a layer that is gone, and is still read, is marked so."""
        found = _NUMBERED.match(f"{name}.")
        if found is None or found[1] != self.prefix:
            return name
        number = int(found[2])
        if number in self.gone:
            return f"{self.prefix}gone_{number}{name[len(self.prefix) + len(found[2]) :]}"
        return f"{self.prefix}{number - sum(g < number for g in self.gone)}{name[len(self.prefix) + len(found[2]) :]}"

    def apply(self, program: Program) -> None:
        program.weights.rename(self.name)
        for node in program.graph.nodes:
            if node.op == "get_attr":
                node.target = self.name(str(node.target))
            if "module" in node.meta:
                node.meta["module"] = self.name(node.meta["module"])
        facts = program.facts
        lost = {name for name in (*facts.parts, *facts.retired, *facts.tied) if self._is_gone(name)}
        facts.tied = {self.name(k): self.name(v) for k, v in facts.tied.items() if k not in lost}
        facts.parts = {
            self.name(k): part.moved(self.name(part.base)) for k, part in facts.parts.items() if k not in lost
        }
        facts.bases = {self.name(k): value for k, value in facts.bases.items() if not self._is_gone(k)}
        facts.retired = {self.name(k): value for k, value in facts.retired.items() if k not in lost}
        facts.replaced = {self.name(k): value for k, value in facts.replaced.items()}
        facts.constants = {self.name(k) for k in facts.constants}
        facts.added = [self.name(k) for k in facts.added if not self._is_gone(k)]

    def _is_gone(self, name: str) -> bool:
        return self.name(name).startswith(f"{self.prefix}gone_")


class Settings:
    """What tells blocks that compute alike from each other: windows, scales, masks, tables; no weights, no numbers."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[fx.Node, int] = {}
        self._seen: dict[Any, int] = {}

    def of(self, block: Block) -> tuple[Any, ...]:
        """Equal for two blocks that do the same with weights of their own."""
        mine = {block.entry, *block.nodes}
        return tuple(self._told(node, mine) for node in block.nodes)

    def _told(self, node: fx.Node, mine: set[fx.Node]) -> tuple[Any, ...]:
        def told(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return "" if value in mine or (value.op == "get_attr" and mine) else self._number(value)
            return tuple(map(told, value)) if isinstance(value, (list, tuple)) else repr(value)

        options = tuple((key, told(value)) for key, value in node.kwargs.items() if key != "layer")
        return str(node.target), told(node.args), options

    def _number(self, node: fx.Node) -> int:
        """The same for values that are computed alike."""
        if node not in self._known:
            mark = self._content(node) if node.op == "get_attr" else self._told(node, set())
            self._known[node] = self._seen.setdefault(mark, len(self._seen))
        return self._known[node]

    def _content(self, node: fx.Node) -> tuple[Any, ...]:
        """Small tables count by what they hold."""
        weights, name = self.program.weights, str(node.target)
        if weights.numel(name) > _SMALL:
            return ("weight", name)
        held = weights[name]
        return ("weight", str(held.dtype), tuple(held.shape), tuple(held.flatten().tolist()))
