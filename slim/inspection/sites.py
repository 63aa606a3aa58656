"""Which site of a pass pushes the output over a threshold: its sites are taken in one after the other."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from slim.compiler.program import Program
from slim.inspection.hybrid import Hybrid

_WINDOW = 6  # sites after one that may make up for what it does: scales that are moved from one into the other

Measure = Callable[[frozenset[str]], float]


@dataclass
class Group:
    """Sites that change the same nodes, and those nodes."""

    sites: list[str]
    joints: frozenset[str]

    def __str__(self) -> str:
        return ", ".join(self.sites)


@dataclass(frozen=True)
class Culprit:
    """What was found.

    Attributes:
        sites: one, or several that cannot be told apart.
        nodes: the nodes that they insert or change.
        before, with_it: the error with the sites ahead of them, and with them too.
        alone: with them and no other.
        largest: (site, error with it and no other), the largest three; of a pass that loses some.
        note: what the user should know of how sure that is.
    """

    sites: list[str]
    nodes: list[str]
    before: float
    with_it: float
    alone: float
    largest: tuple[tuple[str, float], ...] = ()
    note: str = ""


def groups(hybrid: Hybrid, sites: Sequence[str]) -> list[Group]:
    """The sites in the order of the graph, each with the touched joints nearest to it.

    Where the report names no site that the graph knows, the sites are what the pass inserted, changed or took out.
    """
    anchors = {site: hybrid.readers(site) for site in sites}
    owner: dict[str, list[str]] = defaultdict(list)
    for site, joints in anchors.items():
        for joint in joints:
            owner[joint].append(site)
    if not owner:
        return _merged(hybrid, {name: hybrid.origins(name) for name in hybrid.touched})
    return _merged(hybrid, _claimed(hybrid, dict(owner)))


def _claimed(hybrid: Hybrid, owner: dict[str, list[str]]) -> dict[str, list[str]]:
    """Every touched joint -> its sites: its own, else those of the nearest that has some, else of the one ahead."""
    waiting = deque(name for name in hybrid.touched if name in owner)
    while waiting:
        name = waiting.popleft()
        for other in hybrid.neighbours(name):
            if other not in owner:
                owner[other] = owner[name]
                waiting.append(other)
    last = next(iter(owner.values()))
    for name in hybrid.touched:
        last = owner.setdefault(name, last)
    return owner


def _merged(hybrid: Hybrid, owner: dict[str, list[str]]) -> list[Group]:
    """Sites that share a joint become one group."""
    parent: dict[str, str] = {}

    def root(site: str) -> str:
        while parent.setdefault(site, site) != site:
            site = parent[site]
        return site

    for sites in owner.values():
        for site in sites[1:]:
            parent[root(site)] = root(sites[0])
    held: dict[str, Group] = {}
    for name in hybrid.touched:
        sites = owner[name]
        group = held.setdefault(root(sites[0]), Group([], frozenset()))
        group.sites += [site for site in sites if site not in group.sites]
        group.joints |= {name}
    return list(held.values())


def _nodes(hybrid: Hybrid, joints: Collection[str]) -> list[str]:
    """What is new among that which these joints read, and those joints that do not just read it."""
    found: dict[str, None] = {}
    for name in hybrid.touched:
        if name in joints:
            new = hybrid.inserted(name)
            found |= dict.fromkeys(new if new and not hybrid.does_another_thing(name) else [*new, name])
    return list(found)


def find_site(
    before: Program,
    after: Program,
    sites: Sequence[str],
    measure: Callable[[Hybrid, frozenset[str]], float],
    threshold: float,
    *,
    lossless: bool,
) -> Culprit:
    """The first site, in the order of the graph, with which the error passes ``threshold``.

    Args:
        before, after: the Programs around the pass: with the first the error is below, with the second above.
        sites: as the report of the pass names them.
        measure: (hybrid, chosen joints) -> error.
        lossless: whether the pass promises the same function: then right sites make no error that others do not heal.
    """
    hybrid = Hybrid(before, after)
    found = groups(hybrid, sites)
    search = _Search(found, lambda chosen: measure(hybrid, chosen), threshold, lossless)
    return search.run(hybrid)


class _Search:
    """Binary search over how many groups, from the front, are those of the Program after."""

    def __init__(self, found: Sequence[Group], measure: Measure, threshold: float, lossless: bool) -> None:
        self.groups = found
        self.measure = measure
        self.threshold = threshold
        self.lossless = lossless
        self.known: dict[tuple[int, ...], float] = {}

    def run(self, hybrid: Hybrid) -> Culprit:
        if not self.groups or self.prefix(len(self.groups)) <= self.threshold or self.prefix(0) > self.threshold:
            return self._whole(hybrid)
        clean, broken = 0, len(self.groups)
        while broken - clean > 1:
            middle = (clean + broken) // 2
            healed = self._healed(middle, broken)
            if healed is None:
                broken = middle
            else:
                clean = healed
        return self._culprit(hybrid, clean)

    def prefix(self, count: int) -> float:
        return self.error(range(count))

    def error(self, members: Sequence[int]) -> float:
        """The error with these groups as they are after the pass."""
        key = tuple(members)
        if key not in self.known:
            self.known[key] = self.measure(frozenset().union(*(self.groups[index].joints for index in key)))
        return self.known[key]

    def _healed(self, count: int, below: int) -> int | None:
        """The first number of groups from ``count`` on, and under ``below``, with which all is well."""
        return next((n for n in range(count, min(count + _WINDOW, below)) if self.prefix(n) <= self.threshold), None)

    def _culprit(self, hybrid: Hybrid, clean: int) -> Culprit:
        """What lies right behind ``clean`` groups."""
        last = self._without(clean) if self.lossless else self._together(clean)
        note = "each of these holds what another takes out, so that they cannot be told apart"
        return self._told(hybrid, clean, last, note if last - clean > 1 else "")

    def _without(self, clean: int) -> int:
        """How far the least stretch goes without which the groups behind it do no harm; of a lossless pass."""
        reach = min(clean + 1 + _WINDOW, len(self.groups))
        ahead = list(range(clean))
        for last in range(clean + 1, reach + 1):
            if self.error([*ahead, *range(last, reach)]) <= self.threshold:
                return last
        return clean + 1

    def _together(self, clean: int) -> int:
        """How far a stretch goes whose end takes back most of what its beginning does; of a pass that loses some."""
        reach = min(clean + 1 + _WINDOW, len(self.groups))
        best = min(range(clean + 1, reach + 1), key=self.prefix)
        return best if self.prefix(best) < self.prefix(clean + 1) / 2 else clean + 1

    def _told(self, hybrid: Hybrid, first: int, last: int, note: str) -> Culprit:
        members = range(first, last)
        joints = {name for index in members for name in self.groups[index].joints}
        return Culprit(
            sites=[site for index in members for site in self.groups[index].sites],
            nodes=_nodes(hybrid, joints),
            before=self.prefix(first),
            with_it=self.prefix(last),
            alone=self.error(members),
            largest=() if self.lossless or len(self.groups) == 1 else self._largest(),
            note=note,
        )

    def _largest(self) -> tuple[tuple[str, float], ...]:
        each = [(str(group), self.error([index])) for index, group in enumerate(self.groups)]
        return tuple(sorted(each, key=lambda pair: -pair[1])[:3])

    def _whole(self, hybrid: Hybrid) -> Culprit:
        """All of them, where taking in what the graph shows does not give what the pass made."""
        every = range(len(self.groups))
        sites = [site for group in self.groups for site in group.sites]
        note = "the sites of this pass cannot be separated: what it did is not in nodes that both Programs have"
        error = self.error(every)
        return Culprit(sites, _nodes(hybrid, hybrid.touched), self.prefix(0), error, error, note=note)
