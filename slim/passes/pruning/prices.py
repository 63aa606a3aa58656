"""What units hold of whatever is to become less: parameters, bytes, FLOPs or time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import fx

from slim.compiler.cost import Work, cost, node_work, number
from slim.compiler.dependencies import Kind, Member
from slim.compiler.machine import Machine
from slim.compiler.program import Program
from slim.compiler.uses import ATTENTION, EXPERTS, LINEAR, stored_in
from slim.passes.pruning.sites import HEADS, Site, attention_of, block_parameters, block_weights

Measure = Literal["blocks", "parameters", "bytes", "flops", "latency"]


@dataclass(frozen=True)
class Load:
    """One run of the model that FLOPs and time are counted of.

    Attributes:
        sizes: of the symbols of the costs.
        told: the same for a message.
    """

    sizes: dict[str, int]
    told: str

    @classmethod
    def of(cls, program: Program, context: int) -> Load:
        """One more token behind ``context`` - 1 others; of models that do not write, ``context`` read at once."""
        if program.facts.kind == "causal_lm":
            return cls({"B": 1, "S": 1, "T": context}, f"to write one token, the {context}th of its row")
        read = any("S" in value.shape for value in program.inputs)
        return cls({"B": 1, "S": context, "T": context}, f"to read {context} tokens" if read else "of one row")


@dataclass(frozen=True)
class Prices:
    """What is counted.

    Attributes:
        measure: numbers of the matrices of blocks, numbers or bytes of all weights, FLOPs, or milliseconds of the
            roofline of ``machine``.
        load: of FLOPs and time.
    """

    measure: Measure
    load: Load
    machine: Machine | None = None

    @property
    def unit(self) -> str:
        """What is counted, for a message."""
        return {
            "blocks": "parameters of blocks",
            "parameters": "parameters",
            "bytes": "bytes of weights",
            "flops": f"FLOPs {self.load.told}",
            "latency": f"ms {self.load.told}",
        }[self.measure]

    def total(self, program: Program) -> float:
        """Of the whole Program.

        Raises:
            TypeError: where it has sizes that ``load`` does not know.
        """
        if self.measure == "blocks":
            return block_parameters(program)
        if self.measure == "parameters":
            return program.parameters
        if self.measure == "bytes":
            return program.nbytes
        if self.measure == "flops":
            return cost(program).bind(**self.load.sizes).flops
        return sum(self._milliseconds(work) for _, work in node_work(program))

    def holding(self, program: Program) -> Holding:
        """What its weights, and what attends, hold of the whole."""
        if self.measure in ("flops", "latency"):
            return self._working(program)
        names = block_weights(program) if self.measure == "blocks" else program.weights
        size = program.weights.nbytes if self.measure == "bytes" else program.weights.numel
        return Holding(program, self.measure, {name: float(size(name)) for name in names}, {})

    def _working(self, program: Program) -> Holding:
        works = dict(node_work(program))
        weights = dict[str, float]()
        for node in program.nodes(LINEAR, EXPERTS):
            (weight,) = stored_in(node.args[1])
            if node in works:
                name = str(weight.target)
                cost = self._of_weights(works[node], program.weights.nbytes(name))
                weights[name] = weights.get(name, 0.0) + cost
        attending = {node: self._of(work) for node, work in works.items() if node.target in ATTENTION}
        return Holding(program, self.measure, weights, attending)

    def _of(self, work: Work) -> float:
        return number(work.flops, self.load.sizes) if self.measure == "flops" else self._milliseconds(work)

    def _of_weights(self, work: Work, nbytes: int) -> float:
        """Without the values that come in or go out on the side that stays."""
        if self.measure == "flops":
            return number(work.flops, self.load.sizes)
        assert self.machine is not None
        moved = number(work.nbytes, self.load.sizes) / self.machine.bandwidth
        computed = number(work.flops, self.load.sizes) / self.machine.flops_rate
        return 1e3 * (min(moved, nbytes / self.machine.bandwidth) if moved > computed else computed)

    def _milliseconds(self, work: Work) -> float:
        assert self.machine is not None
        moved = number(work.nbytes, self.load.sizes) / self.machine.bandwidth
        return 1e3 * max(moved, number(work.flops, self.load.sizes) / self.machine.flops_rate)


@dataclass(frozen=True)
class Holding:
    """What each weight and each attention of a Program holds of a measure."""

    program: Program
    measure: Measure
    weights: Mapping[str, float]
    attending: Mapping[fx.Node, float]

    def priced(self, site: Site) -> Site:
        """``site`` with what goes with one of its units."""
        return replace(site, cost=self.gone({site: 1}))

    def gone(self, counts: Mapping[Site, int]) -> float:
        """What goes with so many units of each site; what two of them share is counted once."""
        left = dict[str, dict[int, float]]()
        for site, count in counts.items():
            for member in filter(lambda member: self._counts(site, member), site.group.members):
                sides = left.setdefault(member.weight, {})
                sides[member.dim] = sides.get(member.dim, 1.0) - count * self._share(member)
        weights = sum(self.weights[name] * (1 - math.prod(sides.values())) for name, sides in left.items())
        return weights + sum(count / site.units * self._attending(site) for site, count in counts.items())

    def _share(self, member: Member) -> float:
        """A unit's of the dimension."""
        return int((member.unit == 0).sum()) / self.program.weights.shape(member.weight)[member.dim]

    def _counts(self, site: Site, member: Member) -> bool:
        """A token asks as many experts of few as of many, so that only their router gets cheaper."""
        worked = self.measure in ("flops", "latency")
        asked = worked and site.kind is Kind.EXPERT and member.weight in self._experts
        return member.weight in self.weights and not asked

    @cached_property
    def _experts(self) -> set[str]:
        return {str(weight.target) for node in self.program.nodes(EXPERTS) for weight in stored_in(node.args[1])}

    def _attending(self, site: Site) -> float:
        """Of the attention whose heads they are; its time is that of keys and values, which query heads leave."""
        if site.kind not in HEADS or (self.measure == "latency" and site.kind is Kind.QUERY_HEAD):
            return 0.0
        return self.attending.get(attention_of(site.value), 0.0)
