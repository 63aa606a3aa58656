"""The cheapest pattern of each head that keeps a share of its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from slim.compiler.patterns import DENSE, read_pattern
from slim.compiler.patterns.picture import kept_by_head, sees
from slim.compiler.patterns.terms import Term, Top
from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.statistics.attention import kept_attention
from slim.compiler.statistics.batches import Batch
from slim.passes.sparsity.kinds import KINDS

RUN = 16  # keys: kernels leave out runs of so many of which a pattern keeps none
_WIDTHS = tuple(2**n for n in range(3, 20))

# What is tried of each kind. vertical_slash is not among them: decoding is dense with it.
SETTINGS: dict[str, tuple[Mapping[str, int], ...]] = {
    "window": tuple({"window": width} for width in _WIDTHS),
    "strided": tuple({"window": width, "stride": step} for width in (32, 128) for step in (32, 64, 128)),
    "fixed": tuple({"block": size, "summary": 8} for size in (64, 128, 256)),
    "longformer": tuple({"window": width, "global_tokens": 64} for width in _WIDTHS),
    "bigbird": ({},),
    "block_topk": tuple({"share": share} for share in (16, 8, 4)),
}


@dataclass(frozen=True)
class Candidate:
    """A pattern that a head may get.

    Attributes:
        kind: the name of it. text: as the IR has it.
        reads: how many keys a query of a calibration sequence reads, on the mean.
    """

    kind: str
    text: str
    reads: float

    @property
    def terms(self) -> tuple[Term, ...]:
        """None for "dense"."""
        return read_pattern(self.text).of(0)

    @property
    def top(self) -> Top | None:
        return read_pattern(self.text).top


def cheapest(
    program: Program, nodes: Sequence[fx.Node], batches: Sequence[Batch], among: Sequence[str], sinks: int, mass: float
) -> dict[fx.Node, list[Candidate]]:
    """For each head of each node the candidate that reads fewest keys, of those that keep ``mass`` of its attention.

    Keys are counted in sequences as long as the longest batch.

    Args:
        among: names of ``SETTINGS``. sinks: first tokens that kinds with that option keep.
    """
    tokens = max(int(batch.inputs[0].shape[1]) for batch in batches)
    alike: dict[tuple[bool, int | None], list[Candidate]] = {}
    tried: dict[fx.Node, list[Candidate]] = {}
    for node in nodes:
        sight = bool(argument(node, "causal")), argument(node, "window")
        if sight not in alike:
            alike[sight] = candidates(*sight, tokens, among, sinks)
        tried[node] = alike[sight]
    texts = list(dict.fromkeys(candidate.text for each in alike.values() for candidate in each))
    kept = kept_attention(program, nodes, batches, texts)
    found: dict[fx.Node, list[Candidate]] = {}
    for node in nodes:
        share = [dict(zip(texts, shares, strict=True)) for shares in kept[node].tolist()]
        found[node] = _of_heads([[c for c in tried[node] if c.text == DENSE or of[c.text] >= mass] for of in share])
    return found


def candidates(causal: bool, window: int | None, tokens: int, among: Sequence[str], sinks: int) -> list[Candidate]:
    """Dense, and what reads less, in the order of ``SETTINGS``, of an attention that sees that much."""
    seen = sees(tokens, causal=causal, window=window)
    dense = Candidate(DENSE, DENSE, _reads(DENSE, seen))
    others = []
    for kind in SETTINGS:
        for setting in SETTINGS[kind] if kind in among else ():
            text = KINDS[kind].text({"sinks": sinks, **setting})
            fits = setting.get("window", 0) < tokens
            if fits and (causal or not any(term.looks_back for term in read_pattern(text).terms)):
                others.append(Candidate(kind, text, _reads(text, seen)))
    return [dense, *(candidate for candidate in others if candidate.reads < dense.reads)]


def _reads(text: str, seen: torch.Tensor) -> float:
    """Keys a query reads: in runs, and to choose among blocks; what is drawn or chosen, for one head."""
    tokens = len(seen)
    kept = kept_by_head(text, tokens, 1, seen)
    runs = F.pad(kept, (0, -tokens % RUN)).unflatten(-1, (-1, RUN)).any(-1).sum() / tokens
    return float(runs) * RUN + sum(term.keys_to_choose(tokens / 2) for term in read_pattern(text).terms)


def _of_heads(allowed: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The cheapest of each head's candidates; the heads that choose blocks must all choose alike."""
    tops = dict.fromkeys([None, *(candidate.top for each in allowed for candidate in each)])

    def with_top(top: Top | None) -> list[Candidate]:
        return [min((c for c in each if c.top in (None, top)), key=lambda c: c.reads) for each in allowed]

    return min(map(with_top, tops), key=lambda chosen: sum(candidate.reads for candidate in chosen))
