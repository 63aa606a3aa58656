"""Near misses: where a rule all but fits, and why it does not apply.

A pattern is made of what must be there, else there is nothing to say, and of conditions, written here, on numbers and
axes. Once the rules have come to rest, each is looked for again with its conditions lifted: those that were not met are
the reasons. Besides, a rule lists other spellings (``Rule.near``) that look like its left side and compute something
else, or that nothing is written for yet.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program, where
from slim.compiler.rules import Bindings, Count, Counts, Pattern, Rule

_UNMET = "conditions that are not met"  # bound to their reasons, and only where conditions are lifted
_SITES, _REASONS = 3, 16  # of a rule that are shown

# -- conditions --------------------------------------------------------------------------------------------------------


class Condition(Pattern):
    """Holds of a literal, or is a reason for a near miss."""

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        reason = self.unmet(value, bound)
        if reason is None:
            yield bound
        elif reason and _UNMET in bound:
            yield {**bound, _UNMET: (*bound[_UNMET], reason)}

    @abstractmethod
    def unmet(self, value: Any, bound: Bindings) -> str | None:
        """None where it is met, else the reason; "" for a value that has nothing to do with it."""


@dataclass(frozen=True)
class Number(Condition):
    """A number within rounding of ``value``; ``what`` names it."""

    value: float
    what: str

    def unmet(self, value: Any, bound: Bindings) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return ""
        met = math.isclose(value, self.value, rel_tol=1e-6)
        return None if met else f"{self.what} is {value:g}, not {self.value:g}"


@dataclass(frozen=True)
class Exactly(Condition):
    """This literal; of another one ``reason`` is said."""

    value: Any
    reason: str

    def unmet(self, value: Any, bound: Bindings) -> str | None:
        return None if type(value) is type(self.value) and value == self.value else self.reason


@dataclass(frozen=True)
class LastAxis(Condition):
    """The last dimension of the tensor bound to ``of``, as a number or a list of one; ``what`` goes over it."""

    of: str
    what: str

    def unmet(self, value: Any, bound: Bindings) -> str | None:
        axes = [value] if isinstance(value, int) else list(value or ())
        shape = bound[self.of].meta["val"].shape
        if not all(isinstance(axis, int) for axis in axes):
            return ""
        if [axis % len(shape) for axis in axes] == [len(shape) - 1]:
            return None
        named = f"dimension {axes[0]}" if len(axes) == 1 else f"dimensions {axes}" if axes else "all dimensions"
        return f"{self.what} goes over {named}, not over the last"


@dataclass(frozen=True)
class Middle(Condition):
    """Half the width of the tensor bound to ``of``, where ``what`` parts it."""

    of: str
    what: str

    def unmet(self, value: Any, bound: Bindings) -> str | None:
        width = bound[self.of].meta["val"].shape[-1]
        if isinstance(width, torch.SymInt) or isinstance(value, fx.Node):
            return None  # a size that is not known here
        if not isinstance(value, int):
            return ""
        return None if 2 * value == width else f"{self.what} is at {value}, not in the middle of {width}"


# -- looking again -----------------------------------------------------------------------------------------------------


def look_again(program: Program, rules: Sequence[Rule], counts: Counts) -> None:
    """Adds to ``counts`` where one of ``rules`` all but fits a node, and why not; of several the one that misses least.

    To be called when they have come to rest: what they leave behind is what they did not apply to.
    """
    by_target: dict[Any, list[Rule]] = defaultdict(list)
    for rule in rules:
        for target in rule.pattern.targets.union(*(near.pattern.targets for near in rule.near)):
            by_target[target].append(rule)
    for node in program.nodes():
        misses = [(rule, reasons) for rule in by_target.get(node.target, ()) for reasons in _misses(rule, node)]
        if misses:
            rule, reasons = min(misses, key=lambda miss: len(miss[1]))
            _note(counts.setdefault(rule.name, Count()), node, " and ".join(reasons))


def _note(count: Count, node: fx.Node, reason: str) -> None:
    told = f"{where(node)}: {reason}"
    if told not in count.misses:
        count.misses.append(told)


def _misses(rule: Rule, node: fx.Node) -> list[tuple[str, ...]]:
    """For each way in which the rule just does not fit, the reasons."""
    lifted: Bindings = {_UNMET: ()}
    found = [bound[_UNMET] for bound in rule.pattern.match(node, lifted)]
    if () in found:  # it fits, and its build function has had its say
        return []
    for near in rule.near:
        bound = next(near.pattern.match(node, lifted), None)
        if bound is not None:
            found.append((*bound[_UNMET], near.reason.format_map(_told(bound))))
    return [tuple(dict.fromkeys(reasons)) for reasons in found]


def _told(bound: Bindings) -> dict[str, Any]:
    """What a reason may name: numbers as they are, of nodes what they do."""
    return {name: value.target if isinstance(value, fx.Node) else value for name, value in bound.items()}


# -- for people --------------------------------------------------------------------------------------------------------


def near_misses(counts: Counts) -> Iterator[str]:
    """A line for each rule that just missed, and each reason: the rule, the first places, the reason."""
    for name, count in counts.items():
        found: dict[str, list[str]] = defaultdict(list)
        for miss in count.misses:
            site, _, reason = miss.partition(": ")
            found[reason].append(site)
        for reason, sites in itertools.islice(found.items(), _REASONS):
            more = f" and {len(sites) - _SITES} more" if len(sites) > _SITES else ""
            yield f"near miss of {name}, at {', '.join(sites[:_SITES])}{more}: {reason}"
        if len(found) > _REASONS:
            yield f"near miss of {name}: {len(found) - _REASONS} more in report.rules"
