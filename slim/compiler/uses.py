"""What a weight is to the nodes that read it: a matrix that rows are multiplied with, a table, or something else."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import fx

from slim.compiler.program import Program

LINEAR = torch.ops.aten.linear.default
EXPERTS = torch.ops.slim.expert_linear.default
EMBEDDING = torch.ops.aten.embedding.default
DEQUANTIZE = torch.ops.slim.dequantize.default
UNPACKS = {  # number format -> what widens its packed numbers to int8
    "int4": torch.ops.slim.unpack_int4.default,
    "int3": torch.ops.slim.unpack_int3.default,
    "nf4": torch.ops.slim.unpack_nf4.default,
}
RESTORING = frozenset({DEQUANTIZE, *UNPACKS.values()})  # what stands between a quantised weight and its readers
ATTENTION = frozenset({
    torch.ops.slim.attention.default, torch.ops.slim.cached_attention.default, torch.ops.slim.paged_attention.default
})  # fmt: skip


class Role(StrEnum):
    """The part a weight plays in the node that reads it."""

    LINEAR = "linear"  # y = x W^T
    EXPERTS = "experts"  # the same, with a matrix chosen per row
    TABLE = "table"  # rows are picked from it
    OTHER = "other"


class Use(NamedTuple):
    """One reader of a weight."""

    node: fx.Node
    role: Role


def uses(value: fx.Node) -> list[Use]:
    """The readers of a weight node, seen through ``slim.dequantize`` and what unpacks its numbers."""
    found: list[Use] = []
    for reader in value.users:
        if reader.target in RESTORING:
            found += uses(reader)
        else:
            found.append(Use(reader, _role(value, reader)))
    return found


def _role(value: fx.Node, reader: fx.Node) -> Role:
    places = [index for index, argument in enumerate(reader.args) if argument is value]
    if len(places) != 1 or value in reader.kwargs.values():
        return Role.OTHER
    known: dict[tuple[Any, int], Role] = {
        (LINEAR, 1): Role.LINEAR,
        (EXPERTS, 1): Role.EXPERTS,
        (EMBEDDING, 0): Role.TABLE,
    }
    return known.get((reader.target, places[0]), Role.OTHER)


def stored_in(value: object) -> list[fx.Node]:
    """The weight nodes that ``value`` is, or is restored from (its numbers first, then the scale); else none."""
    if not isinstance(value, fx.Node):
        return []
    if value.op == "get_attr":
        return [value]
    if value.target not in RESTORING:
        return []
    return [weight for argument in value.all_input_nodes for weight in stored_in(argument)]


def weight_nodes(program: Program) -> Iterator[fx.Node]:
    """The nodes that read weights, in the order in which they are first used."""
    seen: set[fx.Node] = set()
    for node in program.nodes():
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in seen:
                seen.add(argument)
                yield argument


def reached(start: fx.Node, until: frozenset[object]) -> set[fx.Node]:
    """Every node that depends on ``start``, not looking past calls of ``until``."""
    found: set[fx.Node] = set()
    waiting = list(start.users)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node.target not in until:
            waiting.extend(node.users)
    return found
