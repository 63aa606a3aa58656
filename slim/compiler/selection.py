"""Which weights a pass quantises, and why it leaves the others alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import fx

from slim import errors
from slim.compiler.options import literal
from slim.compiler.program import Program
from slim.compiler.report import Report, Skip
from slim.compiler.uses import ATTENTION, EXPERTS, LINEAR, Role, reached, uses, weight_nodes

aten = torch.ops.aten

_MATRIX = frozenset({Role.LINEAR, Role.EXPERTS})
_MIXES = frozenset({LINEAR, EXPERTS, *ATTENTION})


class Choice(NamedTuple):
    """What the user wants of which weights.

    Attributes:
        pass_name: for messages.
        embeddings: tables too; None where there is no such option.
        head: a language model's head too; None is False, but says nothing where there is none.
        exclude: patterns of names to leave alone.
    """

    pass_name: str
    embeddings: bool | None
    head: bool | None
    exclude: Sequence[str]


def chosen_weights(program: Program, choice: Choice, report: Report) -> Iterator[fx.Node]:
    """The weight nodes to quantise; the others go into ``report`` with the reason.

    Raises:
        BadPassOption: a pattern that matches no weight. ContradictoryOptions: a tied head wanted and not wanted.
    """
    excluded = {name: f"it is excluded by {literal(pattern)}" for name, pattern in _excluded(program, choice).items()}
    heads = _heads(program)
    if choice.head is False and not heads:
        report.notes.append("head=False has nothing to leave out: this model has no language model head")
    for node in _matrices(program):
        name = str(node.target)
        reason = excluded.get(name) or _refused(node, node in heads, choice)
        if reason:
            report.skipped.append(Skip(name, reason))
            continue
        if is_shared(node) and choice.embeddings is False:
            report.notes.append(f"{name} is embedding and head at once, so the embedding goes with the head")
        yield node


def _excluded(program: Program, choice: Choice) -> dict[str, str]:
    return {name: pattern for pattern in choice.exclude for name in names_like(program, pattern, choice, "exclude")}


def names_like(program: Program, pattern: str, choice: Choice, option: str) -> list[str]:
    """The weights that ``pattern`` matches; a tied weight goes by all its names.

    Raises:
        BadPassOption: where there is none.
    """
    canonical = {name: name for name in program.weights} | program.facts.tied
    names = [name for name in canonical if fnmatchcase(name, pattern)]
    if not names:
        reason = f"{literal(pattern)} matches no weight"
        raise errors.BadPassOption(pass_name=choice.pass_name, option=option, reason=reason)
    return list(dict.fromkeys(canonical[name] for name in names))


def _refused(node: fx.Node, is_head: bool, choice: Choice) -> str | None:
    """Why the weight of ``node`` is left alone; None where it is not."""
    found = uses(node)
    others = [use.node.target for use in found if use.role is Role.OTHER]
    if others:
        return f"it is read by {others[0]}, which is no linear"
    if is_head and not choice.head:
        if choice.embeddings and is_shared(node):
            raise errors.ContradictoryOptions(
                a="embeddings=True", b="head=False", reason=f"{node.target} is embedding and head at once"
            )
        return "it is the head (head=False)"
    if all(use.role is Role.TABLE for use in found) and not choice.embeddings:
        return "it is an embedding" + " (embeddings=False)" * (choice.embeddings is False)
    if any(_routes(use.node) for use in found if use.role is Role.LINEAR):
        return "it routes tokens to experts"
    return None


def is_shared(node: fx.Node) -> bool:
    """Whether the weight is a table and a matrix at once."""
    roles = {use.role for use in uses(node)}
    return Role.TABLE in roles and bool(roles & _MATRIX)


def _matrices(program: Program) -> Iterator[fx.Node]:
    """The weight nodes that hold floating-point matrices, or stacks of them."""
    for node in weight_nodes(program):
        value = node.meta["val"]
        if value.dtype.is_floating_point and value.dim() >= 2 and value.numel() > 0:
            yield node


def _heads(program: Program) -> set[fx.Node]:
    """Weights of the linears of a language model whose results are seen by its output alone."""
    if program.facts.kind != "causal_lm":
        return set()
    last = [node for node in program.nodes(LINEAR) if not any(n.target in _MIXES for n in reached(node, _MIXES))]
    return {node.args[1] for node in last if isinstance(node.args[1], fx.Node)}


def _routes(linear: fx.Node) -> bool:
    """Whether the result picks experts: it reaches a top-k before any other matrix."""
    return any(node.target is aten.topk.default for node in reached(linear, _MIXES))
