"""Dependency groups: the units that a Program can lose, and which rows and columns of which weights make each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor, fx

from slim.compiler.dependencies.flow import Flow
from slim.compiler.dependencies.sentence import Told, sentence, told
from slim.compiler.dependencies.slots import Fixed
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.uses import Role, uses


class Kind(StrEnum):
    """What a unit of a group is."""

    NEURON = "neuron"  # between two linears, behind something nonlinear
    RANK = "rank"  # between two linears with nothing nonlinear in between
    KV_HEAD = "kv head"  # with its queries
    QUERY_HEAD = "query head"  # the same one of every kv head
    EXPERT = "expert"
    CHANNEL = "channel"  # anything else


class Kept(NamedTuple):
    """A linear that reads nothing that could be taken out.

    Attributes:
        kind: of what it reads.
    """

    site: str
    reason: str
    kind: Kind


@dataclass(frozen=True, eq=False)
class Member:
    """A dimension of a weight some of whose indices belong to a group.

    Attributes:
        unit: int64, the unit that each index belongs to, or -1.
        what: what an index along the dimension is called.
        told: the same of the weight as the model stores it.
    """

    weight: str
    dim: int
    unit: Tensor
    what: str
    told: Told

    def of(self, unit: int) -> list[int]:
        return (self.unit == unit).nonzero()[:, 0].tolist()


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind that lie in the same dimensions of the same weights; each can be taken out by itself.

    Attributes:
        roots: int64 [units], the slot that stands for each.
        linears: the nodes whose weights' columns are among the members: what they read loses those features.
        least: how many must stay; of experts as many as a token is sent to.
    """

    kind: Kind
    members: tuple[Member, ...]
    roots: Tensor
    linears: tuple[fx.Node, ...]
    least: int = 1

    @property
    def units(self) -> int:
        return len(self.roots)

    @property
    def site(self) -> str:
        """The part of the model that all members lie in."""
        paths = [member.told.weight.split(".") for member in self.members]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join(parts[0] for parts in shared) or paths[0][0]

    def columns(self, linear: fx.Node) -> Tensor:
        """int64 [n]: the unit of each feature that ``linear``, one of ``linears``, reads, or -1."""
        shape = linear.args[1].meta["val"].shape  # type: ignore[union-attr]
        name = _weight_of(linear)
        return next(m.unit for m in self.members if m.weight == name and m.dim == len(shape) - 1)

    def __str__(self) -> str:
        return sentence(self.kind, self.site, self.units, [member.told for member in self.members])


def find_groups(program: Program, flow: Flow) -> tuple[list[Group], list[Kept]]:
    """The groups of ``program``, in the order of the graph; and the linears none of whose features can be taken out."""
    root = flow.slots.components()
    fixed = flow.slots.fixed(root)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    weights = [node for node in flow.axes if node.op == "get_attr" and node.users]
    weights.sort(key=lambda node: min(order[user] for user in node.users))
    places = [(node, dim, root[axis]) for node in weights for dim, axis in enumerate(flow.of(node)) if axis is not None]
    signature = _signatures(len(root), [roots for _, _, roots in places])
    kinds = _Kinds(root, flow)
    found: dict[int, list[tuple[fx.Node, int, Tensor]]] = {}
    for node, dim, roots in places:
        for mark in signature[roots[~fixed[roots]]].unique().tolist():
            found.setdefault(mark, []).append((node, dim, roots))
    groups = [
        group
        for mark, held in found.items()
        if (group := _group(program, held, signature, mark, kinds, flow)) is not None
    ]
    groups.sort(key=lambda group: min(order[linear] for linear in group.linears))
    return groups, list(dict.fromkeys(_kept(program, flow, root, fixed, kinds)))


def _signatures(slots: int, places: Sequence[Tensor]) -> Tensor:
    """[slots]: a number for each root that says which of ``places`` it is in."""
    generator = torch.Generator().manual_seed(0)
    marks = torch.randint(1, 2**62, (len(places),), generator=generator)
    signature = torch.zeros(slots, dtype=torch.long)
    for mark, roots in zip(marks, places, strict=True):
        signature[roots.unique()] += mark  # wraps around, and is as good a hash for it
    return signature


class _Kinds:
    def __init__(self, root: Tensor, flow: Flow) -> None:
        self.by, self.root = flow.by, root
        self.heads, self.experts, self.bent = (
            set(torch.cat([root[axis] for axis in part]).unique().tolist()) if part else set()
            for part in (flow.heads, flow.experts, flow.bent)
        )

    def of(self, root: int, members: Sequence[Member]) -> Kind:
        if root in self.heads:
            return Kind.KV_HEAD if self.by == "kv" else Kind.QUERY_HEAD
        if root in self.experts:
            return Kind.EXPERT
        if root in self.bent:
            return Kind.NEURON
        names = {member.what for member in members}
        return Kind.RANK if {"row", "column"} <= names else Kind.CHANNEL


def _group(
    program: Program,
    held: Sequence[tuple[fx.Node, int, Tensor]],
    signature: Tensor,
    mark: int,
    kinds: _Kinds,
    flow: Flow,
) -> Group | None:
    """None where no linear reads the units: nothing is saved by what is not multiplied."""
    roots = torch.cat([roots[signature[roots] == mark] for _, _, roots in held[:1]]).unique()
    number = torch.full((len(signature),), -1)
    number[roots] = torch.arange(len(roots))
    members, linears = [], []
    for node, dim, all_roots in held:
        role, readers = _role(node)
        name, unit = str(node.target), number[all_roots]
        what = _called(role, dim, node)
        members.append(Member(name, dim, unit, what, told(program, name, dim, unit, what)))
        if role in (Role.LINEAR, Role.EXPERTS) and dim == len(node.meta["val"].shape) - 1:
            linears += readers
    kind = kinds.of(int(roots[0]), members)
    if kind is Kind.EXPERT:
        linears = [reader for node, dim, _ in held for reader in _role(node)[1] if dim == 0]
    if len(roots) < 2 or not linears or kind is Kind.CHANNEL:
        return None
    members.sort(key=lambda member: member.what == "column")
    least = _least(flow, kinds, roots) if kind is Kind.EXPERT else 1
    return Group(kind, tuple(members), roots, tuple(dict.fromkeys(linears)), least)


def _least(flow: Flow, kinds: _Kinds, roots: Tensor) -> int:
    """How many of the experts some node picks at once."""
    picked = (node for node, slots in flow.ids.items() if bool(torch.isin(kinds.root[slots], roots).any()))
    return max((int(argument(node, "k")) for node in picked if node.target is torch.ops.aten.topk.default), default=1)


def _role(node: fx.Node) -> tuple[Role, list[fx.Node]]:
    """What a weight is to its readers, and those."""
    found = uses(node)
    return (found[0].role if found else Role.OTHER), [use.node for use in found]


_CALLED = {Role.LINEAR: ("row", "column"), Role.EXPERTS: ("matrix", "row", "column"), Role.TABLE: ("row", "column")}


def _called(role: Role, dim: int, node: fx.Node) -> str:
    names = _CALLED.get(role, ())
    return names[dim] if len(names) == node.meta["val"].dim() else "entry" if node.meta["val"].dim() == 1 else "index"


def _weight_of(linear: fx.Node) -> str:
    node = linear.args[1]
    while isinstance(node, fx.Node) and node.op != "get_attr":
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return str(node.target)


def _kept(program: Program, flow: Flow, root: Tensor, fixed: Fixed, kinds: _Kinds) -> Iterator[Kept]:
    """Linears that keep all they read, with the reason."""
    for node in program.graph.find_nodes(op="get_attr"):
        role, _ = _role(node)
        axis = flow.of(node)[-1] if role in (Role.LINEAR, Role.EXPERTS) else None
        if axis is not None and bool(fixed[root[axis]].all()):
            first, name = int(root[axis[0]]), str(node.target)
            part = program.facts.parts.get(name)
            yield Kept(name if part is None else part.base, fixed.reason(first), kinds.of(first, ()))
