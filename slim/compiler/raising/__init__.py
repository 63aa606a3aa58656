"""Raising: rules that turn the many spellings of a model's source into the dialect's few."""

from __future__ import annotations

from slim.compiler.near import look_again
from slim.compiler.program import Program
from slim.compiler.raising.activations import ACTIVATIONS
from slim.compiler.raising.attention import ATTENTION_RULES, number_layers
from slim.compiler.raising.cleanup import CLEANUP
from slim.compiler.raising.complex_rope import COMPLEX_ROPE
from slim.compiler.raising.constants import fold_constants
from slim.compiler.raising.linears import LINEARS, split_fused
from slim.compiler.raising.norms import NORMS
from slim.compiler.raising.rope import ROPE
from slim.compiler.raising.sharing import share_equal
from slim.compiler.raising.sizes import canonical_sizes
from slim.compiler.rules import Counts, rewrite


def raise_program(program: Program) -> Counts:
    """Rewrites a freshly exported graph until nothing is left of its spelling; returns what each rule did."""
    canonical_sizes(program)
    counts = rewrite(program, CLEANUP)
    share_equal(program)
    fold_constants(program)
    rules = (*CLEANUP, *LINEARS, *ACTIVATIONS, *NORMS, *COMPLEX_ROPE, *ROPE, *ATTENTION_RULES)
    rewrite(program, rules, counts)
    split_fused(program, counts)
    rewrite(program, (*CLEANUP, *ROPE, *ATTENTION_RULES), counts)
    look_again(program, rules, counts)
    share_equal(program)
    number_layers(program)
    _forget_intermediate_parts(program)
    program.infer()
    return counts


def _forget_intermediate_parts(program: Program) -> None:
    """Drops what is remembered of parts that were cut further and are no weights any more."""
    facts = program.facts
    facts.parts = {name: part for name, part in facts.parts.items() if name in program.weights}
    bases = {part.base for part in facts.parts.values()}
    facts.bases = {name: base for name, base in facts.bases.items() if name in bases}
