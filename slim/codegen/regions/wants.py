"""What the kernels of a target take, as its emitter says it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from slim.compiler.patterns import read_pattern
from slim.compiler.patterns.terms import Term
from slim.compiler.rules import argument


@dataclass(frozen=True)
class Wants:
    """What an emitter's kernels take.

    Attributes:
        wide: memory between regions holds any float as float32; otherwise as the type that the Program says.
        packed: quantised weights come in a layout of the kernels' own, with the scales of groups inside.
        formats: of weights that a product reads as they are stored.
        int8_rows: whether a product multiplies rows that the Program quantised as integers.
        requantises: whether what linears store is rounded to int8 at once, where linears alone read it so, in one step.
        own_steps: whether it finds the step of such a row, where that is slim.token_scale of the row, as it loads it.
        terms: of patterns, those by which attention visits no more keys than are kept.
        first: whether attention looks at the first keys with queries of their own.
        mass: whether attention counts what each key gets of it.
        pitched: masks among the inputs, bool [B, T], are read where they lie, rows as far apart as they are.
    """

    wide: bool = True
    packed: bool = True
    formats: frozenset[str] = frozenset({"f32", "bf16", "f16", "int8", "int4"})
    int8_rows: bool = False
    requantises: bool = False
    own_steps: bool = False
    terms: frozenset[type[Term]] = frozenset()
    first: bool = False
    mass: bool = False
    pitched: bool = False

    def attends(self, node: fx.Node) -> bool:
        """Whether there is a kernel for what the heads of attention keep, and how they look at it."""
        return self.objection(node) is None

    def objection(self, node: fx.Node) -> str | None:
        """What of attention there is no kernel for; None for nothing."""
        text = argument(node, "pattern")
        if argument(node, "mass") is not None and not (self.mass and text is None):
            return "that counts what each key gets of it"
        nearer = argument(node, "q_first") is not None
        if (not nearer or self.first) and (text is None or {type(t) for t in read_pattern(text).terms} <= self.terms):
            return None
        return f"that keeps {text}" + " and sees its first keys nearer than they are" * nearer
