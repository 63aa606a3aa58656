"""Which layer keeps how many kv heads, so that all keys and values fit into a share of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from slim.compiler.allocation import Option, allocate
from slim.compiler.objective import Objective
from slim.compiler.passes_base import Context
from slim.compiler.program import Program, Streaming
from slim.compiler.statistics import SiteStatistics, walk
from slim.compiler.statistics.batches import Batch
from slim.passes.heads.find import Heads, find_heads
from slim.passes.heads.layer import Made, MergedLayer, as_weights
from slim.passes.heads.write import write_heads

# What merging a layer to so many kv heads makes of it, by the statistics of its input.
MergeTo = Callable[[Heads, SiteStatistics, int], MergedLayer]


def divisors(held: int) -> list[int]:
    """Numbers of kv heads that ``held`` ones merge into, the smallest first; ``held`` itself is the last."""
    return [n for n in range(1, held + 1) if held % n == 0]


def numbers_a_token(heads: Heads) -> int:
    """How many numbers one kv head caches for each token."""
    return heads.k.width + heads.v.width


def share_out(layers: Sequence[Heads], damages: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The kv heads of each layer with which all cache ``budget`` numbers a token; None where that cannot be.

    Args:
        damages: of each layer, for each of its ``divisors``.
    """
    options = [
        [Option(n * numbers_a_token(heads), damage) for n, damage in zip(divisors(heads.k.heads), lost, strict=True)]
        for heads, lost in zip(layers, damages, strict=True)
    ]
    chosen = allocate(options, budget)
    if chosen is None:
        return None
    return [divisors(heads.k.heads)[index] for heads, index in zip(layers, chosen, strict=True)]


def damages(
    program: Program, ctx: Context, layers: Sequence[Heads], batches: Sequence[Batch], merge: MergeTo, asked_by: str
) -> list[list[float]]:
    """What merging each layer alone costs, for each of its ``divisors``: how far the model's output then moves.

    It is measured at the fewest heads, on ``batches``; between there and none lost it follows the predicted losses.
    """
    sites = {heads.q.linear.args[0]: heads for heads in layers}
    objective = Objective.of(program)
    wanted = [_outputs(program, batch) for batch in batches]
    found: dict[Any, list[float]] = {}
    values = [value for value in sites if isinstance(value, fx.Node)]
    for block in walk(program, values, ctx, asked_by=asked_by, gram=True, changes=False, grain="site"):
        for value in block.values:
            heads, name = sites[value], f"damage of {value.name}"
            if not block.restored:
                lost = [merge(heads, block.statistics[value], n) for n in divisors(heads.k.heads)[:-1]]
                curve = torch.tensor([one.key_loss + one.value_loss for one in lost], dtype=torch.float64)
                other = _merged(program, heads, as_weights(program, heads, lost[0]))
                pairs = zip(batches, wanted, strict=True)
                moved = sum(float(objective.loss(_outputs(other, batch), given, batch)) for batch, given in pairs)
                block.results[name] = curve * (moved / len(batches) / max(float(curve[0]), 1e-12))
            found[value] = [*block.results[name].tolist(), 0.0]
    return [found[heads.q.linear.args[0]] for heads in layers]


def _merged(program: Program, heads: Heads, made: Made) -> Program:
    """A copy in which this layer has one kv head."""
    other = program.copy()
    twin = next(node for node in other.attention_nodes() if node.name == heads.attention.name)
    write_heads(other, find_heads(other, twin), made, 1)
    other.infer()
    return other


@torch.no_grad()
def _outputs(program: Program, batch: Batch) -> Sequence[Any]:
    found = Streaming(program).run(*batch.inputs)
    return found if isinstance(found, (tuple, list)) else (found,)
