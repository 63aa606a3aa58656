"""What the model's loss says of units, to first order: one backward run over the calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.statistics.batches import Batch
from slim.passes.pruning.sites import Site

TOKENS = 16_384  # of the calibration data, at most


def fisher(program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context) -> dict[Site, Tensor]:
    """[units]: E (dL / dm)^2 over batches, with m = 1 a factor on all that the unit makes (Kwon et al., 2022)."""
    totals = {site: torch.zeros(site.units) for site in sites}
    for values, _ in _backward(program, batches, sites, ctx, weights=()):
        for site in sites:
            value = values[site.value]
            assert value.grad is not None
            slopes = (value.detach() * value.grad).reshape(-1, value.shape[-1]).sum(0)
            totals[site] += site.per_unit(slopes).square()
    return totals


def taylor(program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context) -> dict[Site, Tensor]:
    """[units]: the sum of |w dL/dw| over every weight that goes with the unit (Ma et al., LLM-Pruner, 2023)."""
    names = list(dict.fromkeys(member.weight for site in sites for member in site.group.members))
    slopes = {name: torch.zeros(program.weights.shape(name)) for name in names}
    for _, held in _backward(program, batches, sites, ctx, weights=names):
        for name in names:
            grad = held[name].grad
            if grad is not None:
                slopes[name] += grad.float()
    totals = {site: torch.zeros(site.units) for site in sites}
    for site in sites:
        for member in site.group.members:
            moved = (program.weights[member.weight].float() * slopes[member.weight]).abs()
            rows = moved.transpose(0, member.dim).flatten(1).sum(1) if moved.dim() > 1 else moved
            mine = member.unit >= 0
            totals[site].index_add_(0, member.unit[mine], rows[mine])
    return totals


class _Recorder(fx.Interpreter):
    """Keeps the values of some nodes, with their gradients."""

    def __init__(self, program: Program, weights: dict[str, Tensor], kept: Sequence[fx.Node]) -> None:
        super().__init__(fx.GraphModule({}, fx.Graph()), graph=program.graph)
        self.extra_traceback = False
        self.weights, self.nodes = weights, set(kept)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.op == "get_attr":
            return self.weights[str(n.target)]
        value = super().run_node(n)
        if n in self.nodes:
            value = value if value.requires_grad else value.detach().requires_grad_(True)
            value.retain_grad()
            self.values[n] = value
        return value


def _backward(
    program: Program, batches: Sequence[Batch], sites: Sequence[Site], ctx: Context, weights: Sequence[str]
) -> Iterator[tuple[dict[fx.Node, Tensor], dict[str, Tensor]]]:
    """The values that enter the sites' linears, and ``weights``, with their gradients, batch by batch."""
    program.weights.materialise()
    held = {name: program.weights[name].detach() for name in program.weights}
    for batch in ctx.track("gradients", _some(batches)):
        leaves = {name: held[name].clone().requires_grad_(True) for name in weights}
        with torch.enable_grad():
            recorder = _Recorder(program, held | leaves, [site.value for site in sites])
            outputs = recorder.run(*batch.inputs)
            _loss(program, outputs[0], batch).backward()
        yield recorder.values, leaves


def _some(batches: Sequence[Batch]) -> list[Batch]:
    found, tokens = [], 0
    for batch in batches:
        if tokens >= TOKENS:
            break
        found.append(batch)
        tokens += batch.inputs[0].numel()
    return found


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
