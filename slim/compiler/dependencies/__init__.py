"""Dependency groups: which rows and columns of which weights can only be taken out together, read off the graph.

>>> found = Dependencies(program)
>>> print(found.groups[0])
kv head i of model.layers.0.self_attn: rows 16 i to + 15 of q_proj.weight, rows 8 i to + 7 of k_proj.weight and ...
>>> found.remove({found.groups[0]: [2]})  # the Program computes what it did with that head's weights at zero
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.dependencies.flow import By
from slim.compiler.dependencies.follow import follow
from slim.compiler.dependencies.groups import Group, Kept, Kind, Member, find_groups
from slim.compiler.dependencies.mixing import AVERAGED
from slim.compiler.dependencies.remove import remove
from slim.compiler.parts import place_parts
from slim.compiler.program import Program

__all__ = ["AVERAGED", "By", "Dependencies", "Group", "Kept", "Kind", "Member"]


class Dependencies:
    """The units that ``program`` can lose, and what losing them takes.

    Attributes:
        groups: in the order of the graph, each of two units at least.
        skipped: linears that read nothing that could be taken out, with the reason.

    Args:
        by: "kv": an attention loses kv heads, each with the query heads that read it. "query": it loses the j-th
            query head of every kv head, and keys and values stay.
    """

    def __init__(self, program: Program, by: By = "kv") -> None:
        self.program = program
        self._flow = follow(program, by)
        self.groups, self.skipped = find_groups(program, self._flow)
        self._root = self._flow.slots.components()
        self._alive = torch.ones(len(self._root), dtype=torch.bool)
        self._touched = self._nodes_of_groups()

    def left(self, group: Group) -> Tensor:
        """int64: the units of ``group``, by the numbers they had, that were not removed."""
        return self._alive[group.roots].nonzero()[:, 0]

    def remove(self, units: Mapping[Group, Sequence[int] | Tensor]) -> None:
        """Takes ``units`` of each group, by the numbers they had at first, out of the Program, for good.

        Raises:
            BadInput: where none would be left, or fewer experts than a token is sent to.
        """
        alive = self._alive.clone()
        gone = torch.zeros_like(alive)
        for group, numbers in units.items():
            gone[group.roots[torch.as_tensor(numbers, dtype=torch.long)]] = True
            if not bool((alive & ~gone)[group.roots].any()):
                raise errors.BadInput(argument="units", reason=f"no {group.kind} of {group.site} would be left")
        alive &= ~gone[self._root]
        nodes = dict.fromkeys(node for group in units for node in self._touched[group])
        order = {node: index for index, node in enumerate(self.program.graph.nodes)}
        changed = remove(self.program, self._flow, sorted(nodes, key=order.__getitem__), alive)
        self._alive = alive
        place_parts(self.program, changed)

    def _nodes_of_groups(self) -> dict[Group, list[fx.Node]]:
        """The nodes that have something of a group in a dimension of theirs, or pick from one."""
        owner = torch.full((len(self._root),), -1)
        for number, group in enumerate(self.groups):
            owner[group.roots] = number
        owner = owner[self._root]
        found: dict[Group, list[fx.Node]] = {group: [] for group in self.groups}
        for node in self._flow.axes:
            held = [*_tensors(self._flow.axes[node]), *_tensors(self._flow.ids.get(node))]
            held += _tensors(self._flow.numbers.get(node))
            for number in {n for axis in held for n in owner[axis].unique().tolist()} - {-1}:
                found[self.groups[number]].append(node)
        return found


def _tensors(axes: Any) -> list[Tensor]:
    if axes is None:
        return []
    return [axes] if isinstance(axes, Tensor) else [axis for part in axes for axis in _tensors(part)]
