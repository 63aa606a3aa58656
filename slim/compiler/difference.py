"""What two Programs differ in: names of nodes and weights as data, and a unified text of the IR for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from slim.compiler.program import Program

Verb = Literal["made", "changed", "removed"]
T = TypeVar("T")


@dataclass
class Names:
    """Names of one kind, nodes or weights, by what became of them; in the order of the Program that has them."""

    made: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.made or self.changed or self.removed)

    def __str__(self) -> str:
        return f"{len(self.made)} added, {len(self.removed)} removed, {len(self.changed)} changed"

    def verb(self, name: str) -> Verb | None:
        """What became of ``name``; None where nothing did."""
        for verb, names in (("made", self.made), ("changed", self.changed), ("removed", self.removed)):
            if name in names:
                return verb  # type: ignore[return-value]
        return None


@dataclass
class Changes:
    """What became of the nodes and weights of one Program on the way to another."""

    nodes: Names = field(default_factory=Names)
    weights: Names = field(default_factory=Names)

    def __bool__(self) -> bool:
        return bool(self.nodes or self.weights)


def changes(before: Program, after: Program, *, read: bool = False) -> Changes:
    """What differs by name.

    A node is changed where its line of IR is another: operation, arguments or type. A weight is changed where shape,
    type or numbers are others. Numbers that are one object in both Programs are equal; others are compared where
    ``read`` says so, one weight at a time, and otherwise taken to differ, which is what a pass means by setting them.
    """
    return Changes(
        _names(lines(before), lines(after), lambda a, b: a == b),
        _names(
            {name: name for name in before.weights},
            {name: name for name in after.weights},
            lambda name, _: _same_weight(before, after, name, read),
        ),
    )


@dataclass
class Gone:
    """A node or weight that a Program had and the next one has not.

    Attributes:
        type: "f32[B, S, 64]".
        line: of a node, its line of IR; empty for a weight.
        nbytes: of a weight.
        origins: (module, file:line) in the model's source: a node's own, or those of the nodes that read the weight.
        heirs: of a weight: the new ones that nodes of the same origins read instead.
    """

    type: str
    line: str = ""
    nbytes: int | None = None
    origins: list[tuple[str, str]] = field(default_factory=list)
    heirs: list[str] = field(default_factory=list)


@dataclass
class AllGone:
    """What a pass removed, by name."""

    nodes: dict[str, Gone] = field(default_factory=dict)
    weights: dict[str, Gone] = field(default_factory=dict)


def gone(before: Program, after: Program, found: Changes) -> AllGone:
    """What was known of the nodes and weights that ``found`` calls removed."""
    from slim.compiler.text import print_node
    from slim.compiler.types import show_type

    nodes = {node.name: node for node in before.nodes()}
    held = {str(node.target): node for node in before.graph.find_nodes(op="get_attr")}
    heirs = _readers_by_origin(after, found.weights.made)
    everything = AllGone()
    for name in found.nodes.removed:
        node = nodes[name]
        kind = show_type(node.meta["val"], before.dims)
        everything.nodes[name] = Gone(kind, print_node(before, node), origins=origins([node]))
    for name in found.weights.removed:
        places = origins(list(held[name].users)) if name in held else []
        instead = dict.fromkeys(heir for place in places for heir in heirs.get(place, ()))
        everything.weights[name] = Gone(
            _type(before, name), nbytes=before.weights.nbytes(name), origins=places, heirs=list(instead)
        )
    return everything


def origins(nodes: Iterable[fx.Node]) -> list[tuple[str, str]]:
    """(module, file:line) of nodes that have one, each once."""
    found = {(node.meta.get("module", ""), node.meta.get("where", "")): None for node in nodes}
    return [(module, place) for module, place in found if module or place]


def _readers_by_origin(program: Program, weights: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Which of ``weights`` the nodes of each origin read."""
    wanted = frozenset(weights)
    found: dict[tuple[str, str], list[str]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        for place in origins(node.users) if node.target in wanted else ():
            found.setdefault(place, []).append(str(node.target))
    return found


def lines(program: Program) -> dict[str, str]:
    """Node name -> its line of IR without the comment, operations alone."""
    from slim.compiler.text import print_node

    return {node.name: print_node(program, node) for node in program.nodes()}


def _names(before: Mapping[str, T], after: Mapping[str, T], equal: Any) -> Names:
    kept = [name for name in after if name in before]
    return Names(
        made=[name for name in after if name not in before],
        changed=[name for name in kept if not equal(before[name], after[name])],
        removed=[name for name in before if name not in after],
    )


def _same_weight(before: Program, after: Program, name: str, read: bool) -> bool:
    a, b = before.weights.raw(name), after.weights.raw(name)
    if a is b:
        return True
    if tuple(a.shape) != tuple(b.shape) or a.dtype != b.dtype:
        return False
    return read and _same_numbers(before.weights[name], after.weights[name])


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, wherever they lie."""
    a, b = (value.detach().contiguous().cpu().view(torch.uint8) if value.dim() else value.cpu() for value in (a, b))
    return torch.equal(a, b)


@dataclass
class Difference:
    """Two Programs side by side; what ``Program.diff`` returns. ``print`` it, or ask it whether there is anything.

    Attributes:
        before, after: the Programs.
        changes: what differs, by name.
        context: equal lines that the text shows around those that differ.
    """

    before: Program
    after: Program
    changes: Changes
    context: int = 2

    @classmethod
    def of(cls, before: Program, after: Program, context: int = 2) -> Difference:
        return cls(before, after, changes(before, after, read=True), context)

    def __bool__(self) -> bool:
        """Whether anything differs."""
        return bool(self.changes)

    def __str__(self) -> str:
        return "\n".join(self._text())

    def summary(self) -> str:
        """How many nodes and weights differ, in a line."""
        return f"nodes: {self.changes.nodes}; weights: {self.changes.weights}" if self else "no difference"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from slim.compiler.notebook import difference_html

        return difference_html(self)

    def _text(self) -> Iterator[str]:
        yield self.summary()
        if not self:
            return
        before, after = lines(self.before), lines(self.after)
        yield from difflib.unified_diff(
            list(before.values()), list(after.values()), "before", "after", n=self.context, lineterm=""
        )
        yield from self._weights()

    def _weights(self) -> Iterator[str]:
        """A line a weight that differs."""
        names = self.changes.weights
        if names:
            yield "weights"
        for name in names.removed:
            yield f"- {name}: {_held(self.before, name)}"
        for name in names.changed:
            a, b = _held(self.before, name), _held(self.after, name)
            yield f"~ {name}: {a}, other numbers" if a == b else f"~ {name}: {a} -> {b}"
        for name in names.made:
            yield f"+ {name}: {_held(self.after, name)}"


def _held(program: Program, name: str) -> str:
    return f"{_type(program, name)}, {program.weights.nbytes(name):,} bytes"


def _type(program: Program, name: str) -> str:
    from slim.compiler.types import show_shape

    return show_shape(program.weights.dtype(name), program.weights.shape(name))
