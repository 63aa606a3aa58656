"""Where units lie: a group of them, and the linear that reads what they make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from slim.compiler.dependencies import AVERAGED, Dependencies, Group, Kept, Kind
from slim.compiler.program import Program
from slim.compiler.report import Skip
from slim.compiler.rules import argument
from slim.compiler.uses import ATTENTION, EXPERTS, LINEAR, Role, uses, weight_nodes

PRUNED = (Kind.NEURON, Kind.KV_HEAD)
HEADS = (Kind.KV_HEAD, Kind.QUERY_HEAD)


@dataclass(frozen=True, eq=False)
class Site:
    """Units that one linear reads, and what each of them holds.

    Attributes:
        linear: the node that reads them; ``aten.linear``, or ``slim.expert_linear`` with a matrix for each expert.
        columns: int64 [n], the unit of each feature that it reads; none of experts, which read all.
        cost: what a unit holds of a measure; see ``Holding.priced``.
    """

    group: Group
    linear: fx.Node
    columns: Tensor
    cost: float = 0.0

    @property
    def value(self) -> fx.Node:
        """What enters the linear: the key of its statistics."""
        return self.linear.args[0]  # type: ignore[return-value]

    @property
    def units(self) -> int:
        return self.group.units

    @property
    def weight(self) -> str:
        return str(self.linear.args[1].target)  # type: ignore[union-attr]

    @property
    def bias(self) -> str | None:
        bias = argument(self.linear, "bias")
        return None if bias is None else str(bias.target)

    @property
    def fitted_bias(self) -> str | None:
        """The bias that is fitted with the weight; none of experts, which have one mean between them."""
        return self.bias if self.linear.target is LINEAR else None

    @property
    def kind(self) -> Kind:
        return self.group.kind

    @property
    def width(self) -> int:
        """Channels of one head, as the values have them; 1 of neurons."""
        if self.kind not in HEADS:
            return 1
        return int(attention_of(self.value).meta["val"].shape[-1])

    def kept(self, gone: Tensor) -> Tensor:
        """int64: the features that are left without the units ``gone``."""
        return (~torch.isin(self.columns, gone)).nonzero()[:, 0]

    def matrix(self, program: Program) -> Tensor:
        """float32 [m, n]: the weight; those of experts one below the other."""
        weight = program.weights[self.weight].float()
        return weight.reshape(-1, weight.shape[-1])

    def per_unit(self, per_column: Tensor) -> Tensor:
        """[units]: the sum over the columns of each."""
        return torch.zeros(self.units, dtype=per_column.dtype).index_add_(0, self.columns, per_column)

    def __str__(self) -> str:
        return self.group.site


def attention_of(value: fx.Node) -> fx.Node:
    """The attention whose results ``value`` is, moved."""
    while value.target not in ATTENTION:
        value = value.all_input_nodes[0]
    return value


def find_sites(
    program: Program, found: Dependencies, protect: Sequence[str] = (), kinds: Sequence[Kind] = PRUNED
) -> tuple[list[Site], list[Skip]]:
    """The sites of ``kinds`` whose weights no pattern of ``protect`` names, and what is left alone, with the reason."""
    sites, skips = [], [Skip(kept.site, kept.reason) for kept in found.skipped if _is_told(kept, kinds)]
    for group in found.groups:
        reason = _reason(group, protect, kinds)
        if reason is None:
            sites.append(_site(group))
        elif group.kind in kinds:
            skips.append(Skip(group.site, reason))
    return sites, skips


def _is_told(kept: Kept, kinds: Sequence[Kind]) -> bool:
    """Whether somebody who asks for ``kinds`` wants to know; norms read every residual stream."""
    if kept.reason == AVERAGED:
        return kept.kind in kinds and kept.kind in HEADS
    return kept.kind in kinds or kept.kind is Kind.CHANNEL


def _site(group: Group) -> Site:
    if group.kind is Kind.EXPERT:  # the last of its linears, none of whose columns belong to one expert
        return Site(group, group.linears[-1], torch.zeros(0, dtype=torch.long))
    return Site(group, group.linears[0], group.columns(group.linears[0]))


def _reason(group: Group, protect: Sequence[str], kinds: Sequence[Kind]) -> str | None:
    """Why a group is left alone."""
    names = {name for member in group.members for name in (member.weight, member.told.weight)}
    named = next((pattern for pattern in protect if any(fnmatchcase(name, pattern) for name in names)), None)
    if group.kind not in kinds:
        return f"its units are of the kind {group.kind}"
    if named is not None:
        return f"{named!r} protects it"
    if group.kind is Kind.EXPERT:
        chosen = any(linear.target is EXPERTS for linear in group.linears)
        return None if chosen else "values are picked of it, and no expert's matrices"
    if len(group.linears) > 1:
        return f"linears read its units {len(group.linears)} times"
    if not bool((group.columns(group.linears[0]) >= 0).all()):
        return "its linear reads other things too"
    return None


def block_weights(program: Program) -> Iterator[str]:
    """The weights of linears inside the model's blocks: no tables, and nothing that makes a result of the model."""
    results = set(program.graph.output_node().all_input_nodes)
    for node in weight_nodes(program):
        found = uses(node)
        inside = all(use.role in (Role.LINEAR, Role.EXPERTS) and use.node not in results for use in found)
        if found and inside and {use.node.target for use in found} <= {LINEAR, EXPERTS}:
            yield str(node.target)


def block_parameters(program: Program) -> int:
    return sum(program.weights.numel(name) for name in block_weights(program))
