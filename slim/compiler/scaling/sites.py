"""Scale sites: where the channels of a value can be divided by a scale that all its readers' columns take up.

A site is found by following what a norm or linear computes through the graph: every element that depends on one of
its channels carries that channel's number of the scale (``carry``), until it enters linears, which multiply their
columns by it. A channel that also goes anywhere else keeps its scale. Nothing is told by names of modules.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.report import Skip
from slim.compiler.rules import argument
from slim.compiler.scaling.absorb import LINEARS, NORMS, Absorber, absorber
from slim.compiler.scaling.carry import RULES, Carried, Carrying, Stops, carry
from slim.compiler.scaling.scaled import scale_weight
from slim.compiler.uses import ATTENTION

FIXED = -1  # the number of a channel that no scale can be put on


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear, or expert linear, whose columns take up a scale.

    Attributes:
        node: the linear.
        columns: int64 [n], the number of the scale that each column of its weight is multiplied by, or FIXED.
    """

    node: fx.Node
    columns: Tensor

    @property
    def value(self) -> fx.Node:
        """What enters it: the key under which statistics are collected."""
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def weight(self) -> str:
        return str(self.node.args[1].target)  # type: ignore[union-attr]


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """Channels that can be divided by a scale of ``size`` positive numbers, and what makes up for it.

    Channels that must be scaled alike share a number: those of query heads that read one kv head do.

    Attributes:
        name: of the weight that takes up 1 / scale.
        absorber: the norm or linear whose channels are divided.
        channels: int64 [m], the number of the scale that each of them is divided by, or FIXED.
        size: how many numbers a scale has.
        readers: the linears whose columns are multiplied.
        power: a reader's input is divided by the scale where the absorber's result is by scale ** (1 / power).
    """

    name: str
    absorber: Absorber
    channels: Tensor
    size: int
    readers: tuple[Reader, ...]
    power: float = 1.0

    @property
    def values(self) -> list[fx.Node]:
        """What enters the readers, each once: the sites of ``slim.compiler.statistics.collect``."""
        return list(dict.fromkeys(reader.value for reader in self.readers))

    @property
    def after_norm(self) -> bool:
        return self.absorber.node.target in NORMS

    def gather(self, reader: Reader, per_column: Tensor, reduce: str = "amax") -> Tensor:
        """[size]: what ``per_column`` [n] says of each number: "amax" or "mean" of its columns, 0 where it has none."""
        free = reader.columns != FIXED
        out = torch.zeros(self.size, dtype=per_column.dtype)
        source = per_column.cpu()[free]
        return out.scatter_reduce(0, reader.columns[free], source, reduce, include_self=False)

    def spread(self, reader: Reader, scale: Tensor) -> Tensor:
        """[n]: the factor of each column of ``reader`` under a scale [size]."""
        return _spread(reader.columns, scale)

    def apply(self, program: Program, scale: Tensor) -> Tensor:
        """Divides by ``scale`` [size], positive and finite, and makes up for it; the function stays the same.

        Weights are scaled when they are read next, from what they were, and rounded once; ``settle`` computes them.

        Returns:
            The scale as applied, which differs from ``scale`` by no more than the rounding of a norm's gain.
        """
        scale = scale.detach().float().cpu()
        if scale.shape != (self.size,) or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(f"{self.name} takes {self.size} positive numbers, not {list(scale.shape)}: {scale}")
        by = _spread(self.channels, scale) ** (1 / self.power)
        done = self.absorber.divide(program, by) ** self.power
        free = self.channels != FIXED
        scale = torch.ones(self.size).index_copy(0, self.channels[free], done[free])
        for name, reader in {reader.weight: reader for reader in self.readers}.items():
            scale_weight(program, name, columns=self.spread(reader, scale))
        return scale


def _spread(numbers: Tensor, scale: Tensor) -> Tensor:
    return torch.where(numbers == FIXED, 1.0, scale[numbers.clamp_min(0)])


def scale_sites(program: Program) -> tuple[list[ScaleSite], list[Skip]]:
    """Every scale site of ``program``, in order, and the inputs of linears that no site scales, with the reason.

    No linear is a reader of two sites.
    """
    flows = [_Flow(program, found) for node in program.nodes(*NORMS, *LINEARS) if (found := absorber(node)) is not None]
    sites: list[tuple[fx.Node, ScaleSite]] = []
    covered: set[fx.Node] = set()
    for flow in sorted(flows, key=lambda flow: (flow.bends, flow.absorber.node)):
        site = flow.site()
        if site is not None and not any(reader.node in covered for reader in site.readers):
            covered |= {reader.node for reader in site.readers}
            sites.append((min(reader.node for reader in site.readers), site))
    left = [node for node in program.nodes(*LINEARS) if node not in covered]
    return [site for _, site in sorted(sites, key=lambda pair: pair[0])], list(_skips(left, flows))


def _skips(linears: Sequence[fx.Node], flows: Sequence[_Flow]) -> Iterator[Skip]:
    found: dict[Skip, None] = {}
    by_start = {flow.absorber.node: flow for flow in flows}
    for node in linears:
        reached = next((Skip(flow.absorber.name, reason) for flow in flows if (reason := flow.reason(node))), None)
        found[reached or _unreached(node, by_start)] = None
    yield from found


def _unreached(linear: fx.Node, flows: dict[fx.Node, _Flow]) -> Skip:
    """Why no scale comes to ``linear``: what of its input none passes, or how one was stopped that began there."""
    origin = _origin(linear)
    if origin in flows and flows[origin].stopped:
        return Skip(flows[origin].absorber.name, next(iter(flows[origin].stopped.values())))
    matrix = linear.args[1]
    name = str(matrix.target) if isinstance(matrix, fx.Node) and matrix.op == "get_attr" else linear.name
    source = "the model's inputs" if origin is None else origin.target
    return Skip(name, f"what enters it comes from {source}, which no scale passes")


def _origin(linear: fx.Node) -> fx.Node | None:
    """What of a linear's input no scale passes, seen through all that a scale may pass; None for the inputs."""
    waiting, seen = [linear.args[0]], set()
    while waiting:
        value = waiting.pop()
        if not isinstance(value, fx.Node) or value in seen or value.op != "call_function":
            continue
        seen.add(value)
        if value.target in ATTENTION:
            waiting.append(argument(value, "v"))
        elif value.target in RULES or value.target is operator.getitem:
            waiting += reversed(value.all_input_nodes)
        elif isinstance(value.meta["val"], Tensor):
            return value
    return None


# -- following ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Arrival:
    """A linear that a scale reaches: the channel of each of its columns, and the power in which it comes."""

    node: fx.Node
    columns: Tensor
    carried: Carried


class _Flow:
    """Where the channels of one norm or linear go."""

    def __init__(self, program: Program, absorber: Absorber) -> None:
        self.absorber = absorber
        self.arrivals: list[_Arrival] = []
        self.refused: dict[fx.Node, str] = {}  # where scales stopped -> why
        self.carrying = Carrying(program)
        value = absorber.node.meta["val"]
        self.width = int(value.shape[-1])
        self.carrying[absorber.node] = Carried(torch.arange(self.width).view(*[1] * (value.dim() - 1), -1))
        self._follow()
        self._check_absorber()
        self._check_readers()

    @property
    def bends(self) -> bool:
        return any(arrival.carried.bends for arrival in self.arrivals)

    def reason(self, linear: fx.Node) -> str | None:
        """Why no channel that reaches ``linear`` can be scaled; None where none reaches it."""
        if linear in self.refused:
            return self.refused[linear]
        for arrival in self.arrivals:
            if arrival.node is linear:
                return next((self.stopped[c] for c in arrival.columns.tolist() if c in self.stopped), None)
        return None

    @property
    def stopped(self) -> dict[int, str]:
        """Channel -> why it keeps its scale."""
        return self.carrying.stopped

    def _follow(self) -> None:
        waiting = list(self.absorber.node.users)
        heapq.heapify(waiting)  # nodes compare by their place, so that all arguments are known before their reader
        seen = set(waiting)
        while waiting:
            node = heapq.heappop(waiting)
            try:
                if not self._arrives(node):
                    self.carrying[node] = carry(node, self.carrying)
            except Stops as stop:
                self.refused[node] = str(stop)
                for source in node.all_input_nodes:
                    self.carrying.stop(source, str(stop))
            for user in node.users if node in self.carrying else ():
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(waiting, user)

    def _arrives(self, node: fx.Node) -> bool:
        """Whether ``node`` is a linear, whose columns take the scale up."""
        if node.op == "output":
            raise Stops("it is a result of the model")
        if node.target not in LINEARS:
            return False
        rows, *others = node.all_input_nodes
        if rows is not node.args[0] or rows not in self.carrying or any(other in self.carrying for other in others):
            raise Stops(f"it goes to {node.target}, and not as its rows")
        carried = self.carrying.one(rows)
        columns = carried.columns(int(rows.meta["val"].shape[-1]))
        if columns is None:
            raise Stops(f"it goes to {node.target}, with another scale for each row")
        self.arrivals.append(_Arrival(node, columns, carried))
        return True

    # -- what may be changed -------------------------------------------------------------------------------------------

    def _check_absorber(self) -> None:
        for weight in self.absorber.weights():
            reason = _not_alone(weight, [self.absorber.node])
            if reason:
                self.carrying.stop_all(range(self.width), reason)

    def _check_readers(self) -> None:
        powers = {arrival.carried.power for arrival in self.arrivals}
        if len(powers) > 1:
            self.carrying.stop_all(range(self.width), f"its readers see it in different powers: {sorted(powers)}")
        readers = {arrival.node: arrival for arrival in self.arrivals}
        for arrival in self.arrivals:
            matrix = arrival.node.args[1]
            assert isinstance(matrix, fx.Node)
            reason = _not_alone(matrix, list(readers))
            if reason is None and any(not torch.equal(readers[u].columns, arrival.columns) for u in matrix.users):
                reason = f"{matrix.target} is read with different scales"
            if reason:
                self.carrying.stop_all(arrival.columns.tolist(), reason)

    def site(self) -> ScaleSite | None:
        """The channels that may be scaled; None where there are none."""
        reached = sorted({channel for arrival in self.arrivals for channel in arrival.columns.tolist()})
        free = [channel for channel in reached if channel not in self.stopped]
        if not free:
            return None
        numbers = torch.full((self.width,), FIXED)
        numbers[free] = torch.arange(len(free))
        readers = [Reader(arrival.node, numbers[arrival.columns]) for arrival in self.arrivals]
        readers = [reader for reader in readers if bool((reader.columns != FIXED).any())]
        power = self.arrivals[0].carried.power
        return ScaleSite(self.absorber.name, self.absorber, numbers, len(free), tuple(readers), power)


def _not_alone(weight: fx.Node, readers: Sequence[fx.Node]) -> str | None:
    """Why a weight cannot be changed for ``readers`` alone; None where it can."""
    if weight.op != "get_attr":
        return f"{weight.name} is computed, by {weight.target}"
    other = next((user for user in weight.users if user not in readers), None)
    return None if other is None else f"{weight.target} is read by {other.target} too"
