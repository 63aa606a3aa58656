"""How much what a linear puts out matters to the model's result: second moments of gradients, from one backward pass.

Labels are drawn from the model's own predictions, so that the moments are those of the Fisher information, which is
the curvature of the divergence from those predictions: an error e of a linear's result costs 1/2 e^T E[g g^T] e nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.statistics import calibration_of
from slim.compiler.statistics.batches import Batch, sequences

TOKENS = 1 << 14  # that gradients are taken of: more changes little
WIDEST = 2048  # results of a linear: beyond that only the diagonal is kept
_SEED = 0


def output_moments(
    program: Program, linears: Sequence[fx.Node], ctx: Context, *, asked_by: str
) -> dict[fx.Node, Tensor]:
    """E[g g^T] of each linear, with g the gradient of the loss by what it puts out: [m, m], or [m] of wide ones.

    The loss of a language model is that of tokens drawn from its own predictions; of any other model it is its results
    times a random normal vector, so that the moments are the curvature of the results' squared error. Sequences go
    through the model one by one, ``TOKENS`` tokens at most; the weights and what one sequence leaves are in memory.

    Raises:
        NeedsCalibration. BadInput: where no gradient arrives at a linear.

    Source: the Fisher information, as Kronecker factors take it: Martens and Grosse, K-FAC, 2015.
    """
    sums: dict[fx.Node, Tensor] = {}
    generator = torch.Generator().manual_seed(_SEED)
    loss = _language if program.facts.kind == "causal_lm" else _any
    rows = list(_rows(calibration_of(program, ctx, asked_by).batches))
    for batch in ctx.track(f"{asked_by}: gradients", rows):
        caught = Catching(program, linears)
        with torch.enable_grad():
            value = loss(caught.run(*batch.inputs), batch.real, generator)
            found = torch.autograd.grad(value, list(caught.results.values()), allow_unused=True)
        for linear, gradient in zip(caught.results, found, strict=True):
            if gradient is not None:
                _add(sums, linear, gradient.reshape(-1, gradient.shape[-1]).float())
    tokens = sum(batch.tokens for batch in rows)
    for linear in linears:
        if linear not in sums:
            reason = f"no gradient of the model's result arrives at {linear.name}"
            raise errors.BadInput(argument="calibration", reason=reason)
    return {linear: total / tokens for linear, total in sums.items()}


def _rows(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Sequences one by one, up to ``TOKENS``; whole batches where the model reads no tokens."""
    taken = 0
    for one in sequences(batches):
        if taken >= TOKENS:
            return
        taken += one.tokens
        yield one


def _language(outputs: Sequence[Any], real: Tensor | None, generator: torch.Generator) -> Tensor:
    """-log p of a token drawn at every place."""
    logits = outputs[0].float()
    logits = logits[real] if real is not None else logits.flatten(0, -2)
    log = logits.log_softmax(-1)
    drawn = torch.multinomial(log.detach().exp(), 1, generator=generator)
    return -log.gather(-1, drawn).sum()


def _any(outputs: Sequence[Any], real: Tensor | None, generator: torch.Generator) -> Tensor:
    """All results times random numbers."""
    floats = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
    kept = [v[real] if real is not None and v.shape[:2] == real.shape else v for v in floats]
    return torch.stack([(v.float() * torch.randn(v.shape, generator=generator)).sum() for v in kept]).sum()


def _add(sums: dict[fx.Node, Tensor], linear: fx.Node, gradient: Tensor) -> None:
    width = gradient.shape[-1]
    if linear not in sums:
        sums[linear] = torch.zeros(width, width) if width <= WIDEST else torch.zeros(width)
    if sums[linear].dim() == 2:
        sums[linear].addmm_(gradient.T, gradient)
    else:
        sums[linear] += gradient.square().sum(0)


class Catching(Streaming):
    """Runs a Program and keeps what some of its nodes make, for gradients by it; ``results`` has that after a run."""

    def __init__(self, program: Program, kept: Sequence[fx.Node]) -> None:
        super().__init__(program)
        self._kept = frozenset(kept)
        self.results: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._kept:
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.results[n] = value
        return value
