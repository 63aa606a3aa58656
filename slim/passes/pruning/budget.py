"""How many units of each site go: the same number in every layer, within a budget that all kinds share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slim.compiler.dependencies import Kind
from slim.compiler.uses import EXPERTS
from slim.passes.pruning.sites import HEADS, Site

Counts = Mapping[Site, int]
_ALIGNED = 8, 4  # numbers of a row of an expert: kernels for groups of matrices read 16 bytes at a time
_WAYS = 6  # to share the budget between heads and neurons that are measured


class TooMuch(Exception):
    """The sites do not hold as much as is to go."""


def multiple_of(width: int) -> int:
    """What a number of neurons is best divisible by: 128 fits every kernel; less where that is much of the width."""
    return min(128, 1 << max(0, (width // 32).bit_length() - 1))


def neurons_kept(site: Site, gone: int, multiple: int | None) -> int:
    """What is left of a site that is to lose ``gone`` neurons at least: a multiple, or as it was."""
    return site.units if gone <= 0 else max(multiple_kept(site, site.units - gone, multiple), 0)


def multiple_kept(site: Site, most: int, multiple: int | None) -> int:
    """The largest number that may be left of a site and is no more than ``most``."""
    step = multiple_of(site.units) if multiple is None else multiple
    if multiple is None and site.kind is Kind.NEURON and site.linear.target is EXPERTS:
        step = max(step, next((aligned for aligned in _ALIGNED if 2 * aligned < site.units), 1))
    return most // step * step


def stays_even(held: int, gone: int) -> bool:
    """Whether heads that could be halved still can be, as merging and sharing among devices want, or are one."""
    left = held - gone
    return held % 2 == 1 or left % 2 == 0 or left == 1


@dataclass(frozen=True)
class Budget:
    """How much is to go, of which sites.

    Attributes:
        wanted: in the measure that the sites' costs are in.
        gone: what goes with so many units of each site: their costs, less what two sites share.
        multiple: what the neurons left are divisible by; None chooses.
        allowed: whether so many heads may go of each site.
        even: an even number of kv heads stays even, or becomes one.
    """

    sites: Sequence[Site]
    wanted: float
    gone: Callable[[Counts], float]
    multiple: int | None
    allowed: Callable[[Counts], bool]
    even: bool = True

    def level(self) -> Counts:
        """Of every kind about the same share, as published recipes have it; neurons make up the difference.

        Raises:
            TooMuch.
        """
        held = sum(site.cost * site.units for site in self.sites)
        ways = self.ways()
        return min(
            ways, key=lambda way: max(abs(way[s] / s.units - self.wanted / held) for s in self._heads or self.sites)
        )

    def ways(self) -> list[Counts]:
        """Ways to share the budget: no heads, one in every layer, and so on, and the neurons that must go beside.

        Raises:
            TooMuch.
        """
        most = max((site.units - 1 for site in self._heads), default=0)
        found: list[Counts] = []
        for lost in ({site: min(count, site.units - 1) for site in self._heads} for count in range(most + 1)):
            kv = [(site, count) for site, count in lost.items() if site.kind is Kind.KV_HEAD]
            if (self.even and not all(stays_even(site.units, count) for site, count in kv)) or not self.allowed(lost):
                continue
            counts = self._filled(lost)
            if counts is not None and not (found and self._is_more(lost)):
                found.append(counts)
            if self._is_more(lost):
                break  # more heads would only be more
        if not found:
            raise TooMuch
        return found

    def binding(self) -> str:
        """The rule without which as much as is wanted could go: what to say where ``ways`` finds none."""
        heads = f"{self._heads[0].kind}s of {self._heads[0]}" if self._heads else ""
        rules: list[tuple[str, dict[str, Any]]] = [
            ("with multiple=1 it could go: neurons are left in multiples", {"multiple": 1}),
            ("it could go if an even number of kv heads did not have to stay even", {"even": False}),
            (f"transformers has no configuration for so few {heads}: with reload=False it could go", {"allowed": _any}),
        ]
        for told, without in rules:
            try:
                replace(self, **without).ways()
            except TooMuch:
                continue
            return told
        least = max(self.sites, key=lambda site: site.group.least)
        count = least.group.least
        return "one of each site must stay" if count == 1 else f"a token is sent to {count} {least.kind}s of {least}"

    def _is_more(self, lost: Counts) -> bool:
        """Whether heads alone are more than is to go."""
        return self.gone(lost) > self.wanted

    @property
    def _heads(self) -> list[Site]:
        return [site for site in self.sites if site.kind in HEADS]

    def _filled(self, lost: Counts) -> Counts | None:
        """With the neurons that are to go beside these heads; None where there are not so many."""
        neurons = [site for site in self.sites if site.kind not in HEADS]
        held = sum(site.cost * site.units for site in neurons)
        missing = max(self.wanted - self.gone(lost), 0.0)
        while not (missing and missing >= held):
            share = missing / held if held else 0.0
            kept = {site: neurons_kept(site, math.ceil(share * site.units - 1e-9), self.multiple) for site in neurons}
            counts = {**lost, **{site: site.units - count for site, count in kept.items()}}
            if any(count < site.group.least for site, count in kept.items()):
                return None
            short = self.wanted - self.gone(counts)
            if short <= 1e-9 * self.wanted:
                return counts
            missing += max(short, *(site.cost for site in neurons))
        return None


def _any(lost: Counts) -> bool:
    return True


def spaced(ways: Sequence[Counts]) -> list[Counts]:
    """A few of them, evenly."""
    return list(ways[:: -(-len(ways) // _WAYS)])
