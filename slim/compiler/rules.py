"""Rewrite rules as data: a name that reads as an equation, a pattern, and a function that builds the right side.

A rule counts how often it was tried (a node of its root operation was seen), how often it matched, and why it gave
up where its pattern fitted and something else did not (a near miss).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from slim.compiler.program import Program, where

Bindings = dict[str, Any]


class NearMiss(Exception):
    """Raised by a rule's build function: the pattern fitted, and this is why it does not apply."""


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument of an ATen or slim call by its name in the schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, declared in enumerate(schema.arguments):
        if declared.name == name:
            if position < len(node.args) and not declared.kwarg_only:
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    return default


# -- patterns ----------------------------------------------------------------------------------------------------------


class Pattern(ABC):
    """Matches a node or a literal, yielding every way to bind its names."""

    @abstractmethod
    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]: ...

    @property
    def targets(self) -> frozenset[Any]:
        return frozenset()


@dataclass(frozen=True)
class Var(Pattern):
    """Anything (that satisfies ``test``), bound to ``name``; the same name again must be the same value."""

    name: str
    test: Callable[[Any], bool] | None = None

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        if self.test is not None and not self.test(value):
            return
        if self.name not in bound:
            yield {**bound, self.name: value}
        elif bound[self.name] is value or (not isinstance(value, fx.Node) and bound[self.name] == value):
            yield bound


@dataclass(frozen=True)
class Literal(Pattern):
    """Exactly this number, or list of patterns."""

    value: Any

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        if not isinstance(value, fx.Node) and value == self.value:
            yield bound


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of ``ops``; positional patterns match the schema's first arguments, the others go unread."""

    ops: frozenset[Any]
    arguments: tuple[Pattern, ...]
    keywords: tuple[tuple[str, Pattern], ...] = ()
    name: str | None = None
    commutes: bool = False

    @property
    def targets(self) -> frozenset[Any]:
        return self.ops

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        if not isinstance(value, fx.Node) or value.target not in self.ops:
            return
        if self.name is not None:
            bound = {**bound, self.name: value}
        names = [a.name for a in value.target._schema.arguments]  # type: ignore[union-attr]
        actual = [argument(value, name) for name in names[: len(self.arguments)]]
        orders = [actual, [actual[1], actual[0], *actual[2:]]] if self.commutes else [actual]
        for order in orders:
            pairs = list(zip(self.arguments, order, strict=False))
            pairs += [(pattern, argument(value, key)) for key, pattern in self.keywords]
            yield from _match_all(pairs, bound)


@dataclass(frozen=True)
class Either(Pattern):
    """The first of several patterns, then the next."""

    choices: tuple[Pattern, ...]

    @property
    def targets(self) -> frozenset[Any]:
        return frozenset().union(*(choice.targets for choice in self.choices))

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        return itertools.chain.from_iterable(choice.match(value, bound) for choice in self.choices)


@dataclass(frozen=True)
class Through(Pattern):
    """``inner``, seen through any number of calls of ``ops`` on their first argument (casts, copies)."""

    ops: frozenset[Any]
    inner: Pattern

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        yield from self.inner.match(value, bound)
        if isinstance(value, fx.Node) and value.target in self.ops:
            yield from self.match(value.args[0], bound)


@dataclass(frozen=True)
class ListOf(Pattern):
    """A list argument whose items match, one pattern an item."""

    items: tuple[Pattern, ...]

    def match(self, value: Any, bound: Bindings) -> Iterator[Bindings]:
        if isinstance(value, (list, tuple)) and len(value) == len(self.items):
            yield from _match_all(list(zip(self.items, value, strict=True)), bound)


def _match_all(pairs: Sequence[tuple[Pattern, Any]], bound: Bindings) -> Iterator[Bindings]:
    if not pairs:
        yield bound
        return
    (pattern, value), rest = pairs[0], pairs[1:]
    for more in pattern.match(value, bound):
        yield from _match_all(rest, more)


def call(*ops: Any, args: Sequence[Any] = (), name: str | None = None, commutes: bool = False, **keywords: Any) -> Call:
    """A Call; strings are names, numbers are literals: ``call(aten.add.Tensor, args=("x", 1))``."""
    pairs = tuple((key, _as_pattern(value)) for key, value in keywords.items())
    return Call(frozenset(ops), tuple(_as_pattern(a) for a in args), pairs, name, commutes)


def _as_pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return Var(value)
    if isinstance(value, (list, tuple)):
        return ListOf(tuple(_as_pattern(v) for v in value))
    return Literal(value)


# -- rules -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """What a pattern bound, and the node it is rooted at."""

    program: Program
    node: fx.Node
    bound: Bindings

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.bound.get(name, default)

    def new(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node in place of the root, with its provenance."""
        return self.program.insert(self.node, target, *args, like=self.node, **kwargs)


@dataclass(frozen=True)
class Near:
    """A spelling that looks like a rule's left side: why the rule does not take it, with what is bound in braces."""

    pattern: Pattern
    reason: str


@dataclass(frozen=True)
class Rule:
    """``build`` returns the node that replaces the root, or None; it may raise NearMiss with the reason.

    ``near`` is read when all rules have come to rest, and is no part of what they match: see ``slim.compiler.near``.
    """

    name: str
    pattern: Pattern
    build: Callable[[Match], fx.Node | None]
    near: tuple[Near, ...] = ()


@dataclass
class Count:
    """What became of one rule."""

    tried: int = 0
    matched: int = 0
    misses: list[str] = field(default_factory=list)


Counts = dict[str, Count]


def rewrite(program: Program, rules: Sequence[Rule], counts: Counts | None = None) -> Counts:
    """Applies ``rules`` to every node until nothing changes, and cleans up what is dead.

    Each replacement must have the type of what it replaces (a rule that changes a type is a fault of the rule).
    """
    counts = {} if counts is None else counts
    for rule in rules:
        counts.setdefault(rule.name, Count())
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.pattern.targets:
            by_target.setdefault(target, []).append(rule)
    changed, sweeps = True, 0
    while changed:
        changed, sweeps = False, sweeps + 1
        if sweeps > _MOST_SWEEPS:
            busiest = max(counts, key=lambda name: counts[name].matched)
            raise RuntimeError(f"the rules do not come to rest; the busiest is {busiest!r}")
        for node in list(program.graph.nodes):
            if node.op == "call_function" and (node.users or node.target in _ROOTS_WITHOUT_USERS):
                changed |= _rewrite_node(program, node, by_target.get(node.target, ()), counts)
        program.clean()
    return counts


Observer = Callable[[Program, Rule, fx.Node, fx.Node], None]
_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Shows ``observer`` every rewrite in its block, the old node and the new, while both are in the graph."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


# Each sweep rewrites every node it can; a program that still changes after this many goes round in a circle.
_MOST_SWEEPS = 100
_ROOTS_WITHOUT_USERS = frozenset({torch.ops.aten._assert_tensor_metadata.default})


def _rewrite_node(program: Program, node: fx.Node, rules: Sequence[Rule], counts: Counts) -> bool:
    for rule in rules:
        count = counts[rule.name]
        count.tried += 1
        try:
            new = next(_built(program, node, rule), None)
        except NearMiss as miss:
            reason = f"{where(node)}: {miss}"
            if reason not in count.misses:
                count.misses.append(reason)
            continue
        if new is None:
            continue
        count.matched += 1
        _same_type(program, rule, node, new)
        observer = _observer.get()
        if observer is not None:
            observer(program, rule, node, new)
        node.replace_all_uses_with(new, propagate_meta=False)
        return True
    return False


def _built(program: Program, node: fx.Node, rule: Rule) -> Iterator[fx.Node]:
    for bound in rule.pattern.match(node, {}):
        new = rule.build(Match(program, node, bound))
        if new is not None:
            yield new


def _same_type(program: Program, rule: Rule, old: fx.Node, new: fx.Node) -> None:
    before, after = old.meta["val"], new.meta["val"]
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        same = before.dtype == after.dtype and len(before.shape) == len(after.shape)
        if not same:
            raise TypeError(
                f"rule {rule.name!r} turned {before.dtype}{list(before.shape)} into {after.dtype}{list(after.shape)}"
            )
