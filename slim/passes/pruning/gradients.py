"""What the model's loss says of units, to first order: one backward run over the calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.statistics.batches import Batch, first_batches
from slim.compiler.statistics.gradients import Catching
from slim.passes.pruning.sites import Site

TOKENS = 16_384  # of the calibration data, at most
_NUMBERS = 1 << 27  # slopes that are held, of all sites together


def fisher(program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context) -> dict[Site, Tensor]:
    """[rows, units]: slopes G of the loss by factors m = 1, a token's on what a unit makes of it (Kwon et al., 2022).

    G^T G is the Fisher information: exact on its diagonal, and beside it that of as many tokens, evenly taken, as fit.
    """
    batches = first_batches(batches, TOKENS)
    tokens = sum(batch.inputs[0].shape[:2].numel() for batch in batches)
    step = max(1, -(-tokens * sum(site.units for site in sites) // _NUMBERS))
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    squares = {site: torch.zeros(site.units) for site in sites}
    for values, found in _backward(program, batches, sites, ctx):
        for site in sites:
            product = (values[site.value].detach() * found[site.value]).float().flatten(0, -2)
            slopes = torch.zeros(len(product), site.units).index_add_(1, site.columns, product)
            squares[site] += slopes.square().sum(0)
            kept[site].append(slopes[::step])
    return {site: _scaled(torch.cat(rows), squares[site]) for site, rows in kept.items()}


def _scaled(rows: Tensor, squares: Tensor) -> Tensor:
    """``rows`` with columns whose sums of squares are ``squares``."""
    return rows * (squares / rows.square().sum(0).clamp_min(torch.finfo(rows.dtype).tiny)).sqrt()


def taylor(program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context) -> dict[Site, Tensor]:
    """[units]: the sum of |w dL/dw| over every weight that goes with the unit (Ma et al., LLM-Pruner, 2023)."""
    names = list(dict.fromkeys(member.weight for site in sites for member in site.group.members))
    slopes = {name: torch.zeros(program.weights.shape(name)) for name in names}
    for _, found in _backward(program, batches, sites, ctx, names):
        for name in names:
            if name in found:
                slopes[name] += found[name].float()
    totals = {site: torch.zeros(site.units) for site in sites}
    for site in sites:
        for member in site.group.members:
            moved = (program.weights[member.weight].float() * slopes[member.weight]).abs()
            rows = moved.transpose(0, member.dim).flatten(1).sum(1) if moved.dim() > 1 else moved
            mine = member.unit >= 0
            totals[site].index_add_(0, member.unit[mine], rows[mine])
    return totals


def _backward(
    program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context, weights: Sequence[str] = ()
) -> Iterator[tuple[dict[fx.Node, Tensor], dict[fx.Node | str, Tensor]]]:
    """Batch by batch what enters the sites' linears, and the gradients by it (by node) and by ``weights`` (by name)."""
    for batch in ctx.track("gradients", first_batches(batches, TOKENS)):
        leaves = {name: program.weights[name].detach().clone().requires_grad_(True) for name in weights}
        caught = Catching(program, [site.value for site in sites])
        caught.weights = program.weights.copy()
        caught.weights.update(leaves)
        with torch.enable_grad():
            loss = _loss(program, caught.run(*batch.inputs)[0], batch)
        asked: dict[fx.Node | str, Tensor] = dict([*caught.results.items(), *leaves.items()])
        found = torch.autograd.grad(loss, list(asked.values()), allow_unused=True)
        gradients = {key: grad for key, grad in zip(asked, found, strict=True) if grad is not None}
        yield caught.results, gradients


def _loss(program: Program, output: Tensor, batch: Batch) -> Tensor:
    """Nats of the next tokens; of what is no language model, the result along a random direction.

    The squared slope along random directions is the Fisher information of a normal distribution around the result.
    """
    if program.facts.kind == "causal_lm":
        ids = batch.inputs[[item.name for item in program.inputs].index("input_ids")]
        targets = ids[:, 1:] if batch.real is None else ids[:, 1:].masked_fill(~batch.real[:, 1:].bool(), -100)
        return F.cross_entropy(
            output[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
    generator = torch.Generator().manual_seed(output.numel())
    signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
    return (output * signs).sum()
