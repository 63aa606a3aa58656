"""How many pairs of a query and a key an attention computes, as expressions of how many queries and keys there are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import sympy
from torch import fx

from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.choose import VOTERS
from slim.compiler.patterns.terms import Rows, Term
from slim.compiler.rules import argument

_Terms = tuple[Term, ...]


def pairs(node: fx.Node, queries: Any, keys: Any) -> sympy.Expr:
    """Of a ``slim.attention`` of the newest ``queries`` tokens of ``keys``, on average over heads.

    Exact for causality, a window, and a window with columns; of other patterns terms are taken as if they never kept
    the same key.
    """
    text, causal, window = (argument(node, name) for name in ("pattern", "causal", "window"))
    every = _causal(queries, keys, window) if causal else _both_ways(queries, keys, window)
    if text is None:
        return every
    pattern, heads = read_pattern(text), int(argument(node, "q").meta["val"].shape[1])
    of_heads = Counter(pattern.of(head) for head in range(heads))
    kept = sum(
        count * (sympy.Min(every, _kept(terms, queries, keys, causal)) if terms else every)
        for terms, count in of_heads.items()
    )
    found = kept / heads
    return found if pattern.vote is None else sympy.Piecewise((every, queries < VOTERS), (found, True))


def keys_seen(node: fx.Node, queries: Any, keys: Any) -> sympy.Expr:
    """How many keys any of the newest ``queries`` tokens sees, on average over heads: those that are read."""
    text, window = argument(node, "pattern"), argument(node, "window")
    seen = keys if window is None else sympy.Min(keys, queries + window - 1)
    if text is None:
        return seen
    pattern, heads = read_pattern(text), int(argument(node, "q").meta["val"].shape[1])
    kept = [_line(terms, True) if terms else (0, 1) for terms in map(pattern.of, range(heads))]
    total = sum(sympy.Min(keys, fixed + share * keys) for fixed, share in kept)
    found = sympy.Min(seen, queries - 1 + total / heads)
    return found if pattern.vote is None else sympy.Piecewise((seen, queries < VOTERS), (found, True))


def _line(terms: _Terms, causal: bool) -> tuple[sympy.Expr, sympy.Expr]:
    """(a, b): a query that sees n keys keeps a + b n of them, if there are as many."""
    each = [term.keys_kept(causal=causal) for term in terms]
    return sympy.Add(*(fixed for fixed, _ in each)), sympy.Min(1, sympy.Add(*(share for _, share in each)))


def _kept(terms: _Terms, queries: Any, keys: Any, causal: bool) -> sympy.Expr:
    fixed, share = _line(terms, causal)
    if causal:
        return _up_to(keys, fixed, share) - _up_to(keys - queries, fixed, share)
    kept = sympy.Min(keys, fixed + share * keys)
    rows = sympy.Min(queries, sum(term.tokens for term in terms if isinstance(term, Rows)))
    return (queries - rows) * kept + rows * keys


def _causal(queries: Any, keys: Any, window: int | None) -> sympy.Expr:
    if window is None:
        return queries * keys - queries * (queries - 1) / 2
    return _up_to(keys, window, 0) - _up_to(keys - queries, window, 0)


def _both_ways(queries: Any, keys: Any, window: int | None) -> sympy.Expr:
    """Back as a causal one, and as far ahead; the query's own key counts once."""
    if window is None:
        return queries * keys
    return _causal(queries, keys, window) + _up_to(queries, window, 0) - queries


def _up_to(tokens: Any, fixed: Any, share: Any) -> sympy.Expr:
    """The sum over n = 1 ... tokens of min(n, fixed + share * n): the first see fewer keys than they may keep."""
    if share == 1:
        return tokens * (tokens + 1) / 2
    few = sympy.Min(tokens, sympy.floor(fixed / (1 - share)))
    early, all_ = few * (few + 1) / 2, tokens * (tokens + 1) / 2
    return early + fixed * (tokens - few) + share * (all_ - early)
