"""Sparsity patterns of attention: which keys a query looks at, as text in the IR and as data.

``window(1024) | columns(4)`` keeps what either term keeps. Heads that differ are told apart by their numbers:
``0-3: dense; 4-7: window(256) | columns(4)``. See ``terms`` for what there is, ``mask`` for what it means.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from slim import errors
from slim.compiler.patterns.terms import TERMS, Term, Top, VerticalSlash

DENSE = "dense"
_KNOWN = f"dense, or terms joined by |: {', '.join(sorted(TERMS))}"


@dataclass(frozen=True)
class Pattern:
    """What each head keeps.

    Attributes:
        groups: (first head, last head, terms) in rising order; no terms keep everything. One group with the last head
            -1 is for all heads.
    """

    groups: tuple[tuple[int, int, tuple[Term, ...]], ...]

    def __str__(self) -> str:
        if self.groups[0][1] == -1:
            return _text(self.groups[0][2])
        return "; ".join(f"{_span(first, last)}: {_text(terms)}" for first, last, terms in self.groups)

    def of(self, head: int) -> tuple[Term, ...]:
        """The terms of one head; none where it keeps everything."""
        for first, last, terms in self.groups:
            if last == -1 or first <= head <= last:
                return terms
        return ()

    @property
    def terms(self) -> frozenset[Term]:
        """Those of any head."""
        return frozenset(term for _, _, terms in self.groups for term in terms)

    @property
    def heads(self) -> int | None:
        """How many heads there are by their numbers; None where all are alike."""
        last = self.groups[-1][1]
        return None if last == -1 else last + 1

    @property
    def top(self) -> Top | None:
        """The one that chooses blocks, if any head has it."""
        return next((term for term in self.terms if isinstance(term, Top)), None)

    @property
    def vote(self) -> VerticalSlash | None:
        """The one that lets the last queries of a prompt choose, if any head has it."""
        return next((term for term in self.terms if isinstance(term, VerticalSlash)), None)

    @property
    def is_dense(self) -> bool:
        return not self.terms


def _text(terms: tuple[Term, ...]) -> str:
    return " | ".join(map(repr, terms)) or DENSE


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def by_head(terms: list[tuple[Term, ...]]) -> Pattern:
    """The pattern of heads that keep ``terms``, one entry a head."""
    groups: list[tuple[int, int, tuple[Term, ...]]] = []
    for head, own in enumerate(terms):
        if groups and groups[-1][2] == own:
            groups[-1] = (groups[-1][0], head, own)
        else:
            groups.append((head, head, own))
    return Pattern(((0, -1, groups[0][2]),) if len(groups) == 1 else tuple(groups))


@functools.lru_cache(maxsize=256)
def read_pattern(text: str) -> Pattern:
    """The pattern that ``text`` names.

    Raises:
        BadInput: for what cannot be read, and for heads some of whose queries would see no key at all.

    Example:
        >>> str(read_pattern("window(8)|columns(2)"))
        'window(8) | columns(2)'
    """
    pattern = Pattern(tuple(_groups(text)))
    for kind in (Top, VerticalSlash):
        if len({term for term in pattern.terms if isinstance(term, kind)}) > 1:
            raise _bad(text, f"the heads of a layer have one {kind.name()} in common")
    return pattern


def _groups(text: str) -> Iterator[tuple[int, int, tuple[Term, ...]]]:
    if ":" not in text:
        yield 0, -1, _terms(text)
        return
    after = 0
    for part in text.split(";"):
        heads, _, body = part.partition(":")
        first, last = _heads(heads, text)
        if first != after or last < first:
            raise _bad(text, f"heads {heads.strip()} do not follow those before: each head is named once, in order")
        yield first, last, _terms(body)
        after = last + 1


def _heads(text: str, whole: str) -> tuple[int, int]:
    ends = [end.strip() for end in text.split("-")]
    if len(ends) > 2 or not all(end.isdigit() for end in ends):
        raise _bad(whole, f"{text.strip()!r} names no heads; write 0-3, or 4")
    return int(ends[0]), int(ends[-1])


def _terms(text: str) -> tuple[Term, ...]:
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _bad(text, str(error)) from None
    if isinstance(body, ast.Name) and body.id == DENSE:
        return ()
    parts: list[ast.expr] = []
    while isinstance(body, ast.BinOp) and isinstance(body.op, ast.BitOr):
        parts.insert(0, body.right)
        body = body.left
    terms = tuple(_term(part, text) for part in (body, *parts))
    if not any(term.sees_itself for term in terms):
        raise _bad(text, "some queries would see no key: add window(1), which keeps a query's own token")
    return terms


def _term(node: ast.expr, text: str) -> Term:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in TERMS:
            try:
                values = [ast.literal_eval(arg) for arg in args]
            except ValueError:
                raise _bad(text, f"{ast.unparse(node)} takes numbers that are written out") from None
            try:
                return TERMS[name](*values)
            except errors.BadInput as error:
                raise _bad(text, error.reason) from None
            except TypeError:
                raise _bad(text, f"{ast.unparse(node)} has the wrong number of values") from None
    raise _bad(text, f"{ast.unparse(node)} is none of {_KNOWN}")


def _bad(text: str, reason: str) -> errors.BadInput:
    return errors.BadInput(argument="pattern", reason=f"{text.strip()!r}: {reason}")
