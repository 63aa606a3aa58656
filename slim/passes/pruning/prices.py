"""What a unit of each site holds of whatever is to become less: parameters, bytes, FLOPs or time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from slim.compiler.cost import Work, cost, node_work, number
from slim.compiler.dependencies import Kind
from slim.compiler.machine import Machine
from slim.compiler.program import Program
from slim.compiler.uses import EXPERTS, LINEAR, stored_in
from slim.passes.pruning.sites import HEADS, Site, attention_of

Measure = Literal["parameters", "bytes", "flops", "latency"]


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
        return cls({"B": 1, "S": context, "T": context}, f"to read {context} tokens")


@dataclass(frozen=True)
class Prices:
    """Attributes:
    measure: what is counted: numbers and bytes of all weights, FLOPs, or milliseconds of the roofline of ``machine``.
    load: of FLOPs and time.
    """

    measure: Measure
    load: Load
    machine: Machine | None = None

    @property
    def unit(self) -> str:
        """What is counted, for a message."""
        return {
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
        if self.measure == "parameters":
            return program.parameters
        if self.measure == "bytes":
            return program.nbytes
        if self.measure == "flops":
            return cost(program).bind(**self.load.sizes).flops
        return sum(self._milliseconds(work) for _, work in node_work(program))

    def priced(self, program: Program, sites: list[Site]) -> list[Site]:
        """``sites`` with what a unit of each holds, which what its loss saves is at least."""
        if self.measure == "parameters":
            return sites
        if self.measure == "bytes":
            return [replace(site, cost=sum(self._bytes(program, site))) for site in sites]
        works = dict(node_work(program))
        return [replace(site, cost=sum(self._work(program, site, works))) for site in sites]

    def _bytes(self, program: Program, site: Site) -> Iterator[float]:
        for member in site.group.members:
            size = program.weights.shape(member.weight)[member.dim]
            yield program.weights.nbytes(member.weight) / size * len(member.of(0))

    def _work(self, program: Program, site: Site, works: dict[fx.Node, Work]) -> Iterator[float]:
        """A unit's share of what each node costs that reads its rows or columns, or that attends with it.

        A token asks as many experts of few as of many, so that of those only the router gets cheaper.
        """
        members = {member.weight: member for member in site.group.members}
        for node in program.nodes(LINEAR, EXPERTS):
            (weight,) = stored_in(node.args[1])
            member = members.get(str(weight.target))
            if member is not None and node in works and not (site.kind is Kind.EXPERT and node.target is EXPERTS):
                share = len(member.of(0)) / program.weights.shape(member.weight)[member.dim]
                yield share * self._of_weights(works[node], program.weights.nbytes(member.weight))
        cached = self.measure == "latency" and site.kind is Kind.QUERY_HEAD  # keys and values stay where queries go
        if site.kind in HEADS and not cached:
            yield self._of(works[attention_of(site.value)]) / site.units

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
