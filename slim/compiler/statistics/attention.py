"""What attention looks at over some calibration tokens, of a Program as it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.patterns.mask import pattern_mask
from slim.compiler.program import Program, Streaming
from slim.compiler.statistics.batches import Batch

Seen = Callable[[fx.Node, Any, Any, Tensor], None]  # node, its arguments, its keywords, its result


@torch.no_grad()
def watch(program: Program, nodes: Sequence[fx.Node], batch: Batch, seen: Seen) -> None:
    """Runs the Program on a batch, and shows ``seen`` each of ``nodes`` with its arguments and its result."""
    _Watching(program, nodes, seen).run(*batch.inputs)


class _Watching(Streaming):
    def __init__(self, program: Program, nodes: Sequence[fx.Node], seen: Seen) -> None:
        super().__init__(program)
        self.nodes, self.seen = frozenset(nodes), seen

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.nodes:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.seen(n, args, kwargs, result)
        return result


@dataclass(frozen=True)
class Attended:
    """Where the query heads of one attention look.

    Attributes:
        reach: [H, distances], the share of a head's attention at each distance, in either direction.
        alike: [H, H], how alike two heads look: the cosine between their attention, 1 for equal heads.
    """

    reach: Tensor
    alike: Tensor


def attended(program: Program, nodes: Sequence[fx.Node], batches: Sequence[Batch]) -> dict[fx.Node, Attended]:
    """Where each ``slim.attention`` of ``nodes`` looks; pad tokens do not count."""
    reach: dict[fx.Node, Tensor] = {}
    overlap: dict[fx.Node, Tensor] = {}
    for batch in batches:

        def seen(node: fx.Node, args: Any, kwargs: Any, result: Tensor, batch: Batch = batch) -> None:
            looks = _weights(node, args, kwargs)
            if batch.real is not None:
                looks = looks * batch.real[:, None, :, None]
            mass, flat = looks.sum(0), looks.transpose(0, 1).flatten(1)
            reach[node] = _longer(reach.get(node), _by_distance(mass))
            overlap[node] = overlap.get(node, 0.0) + (flat @ flat.T).double()

        watch(program, nodes, batch, seen)
    return {node: Attended(_shares(reach[node]), _cosines(overlap[node])) for node in nodes if node in reach}


def kept_attention(
    program: Program, nodes: Sequence[fx.Node], batches: Sequence[Batch], patterns: Sequence[str]
) -> dict[fx.Node, Tensor]:
    """[H, patterns] for each ``slim.attention``: the share of a head's attention that each pattern would keep."""
    kept: dict[fx.Node, Tensor] = {}
    whole: dict[fx.Node, Tensor] = {}
    for batch in batches:

        def seen(node: fx.Node, args: Any, kwargs: Any, result: Tensor, batch: Batch = batch) -> None:
            looks, q, k = _weights(node, args, kwargs), args[0], args[1]
            if batch.real is not None:
                looks = looks * batch.real[:, None, :, None]
            masks = (pattern_mask(text, q, k, None, batch.real, scale=1.0, offset=0) for text in patterns)
            kept[node] = kept.get(node, 0.0) + torch.stack([_left(looks, mask) for mask in masks], 1)
            whole[node] = whole.get(node, 0.0) + looks.sum((0, 2, 3)).double()

        watch(program, nodes, batch, seen)
    return {node: kept[node] / whole[node].clamp_min(1e-300)[:, None] for node in nodes if node in kept}


def _left(looks: Tensor, mask: Tensor) -> Tensor:
    """[H], what a mask leaves of looks [B, H, S, T]."""
    if mask.shape[:2] == (1, 1):  # a product of a matrix and a vector: a tenth of the time
        return (looks.sum(0).flatten(1) @ mask.flatten().to(looks.dtype)).double()
    return (looks * mask).sum((0, 2, 3)).double()


def _weights(node: fx.Node, args: Any, kwargs: Any) -> Tensor:
    """[B, H, S, T]: attention, with all its options, to values that each name one token."""
    q, k, v = args[:3]
    names = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
    found: Tensor = node.target(q, k, names, *args[3:], **kwargs)  # type: ignore[operator]
    return found.float()


def _by_distance(mass: Tensor) -> Tensor:
    """[H, distances] of [H, S, T]."""
    heads, rows, columns = mass.shape
    apart = (torch.arange(rows)[:, None] - torch.arange(columns)).abs().flatten()
    return torch.zeros(heads, max(rows, columns), dtype=torch.float64).index_add_(1, apart, mass.flatten(1).double())


def _longer(held: Tensor | None, new: Tensor) -> Tensor:
    """The sum of two, each filled up with zeros."""
    if held is None:
        return new
    length = max(held.shape[1], new.shape[1])
    return sum(torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in (held, new))  # type: ignore[return-value]


def _shares(reach: Tensor) -> Tensor:
    total = reach.sum(1, keepdim=True)
    return torch.where(total > 0.0, reach / total.clamp_min(1e-300), 1.0 / reach.shape[1])


def _cosines(overlap: Tensor) -> Tensor:
    size = overlap.diagonal().clamp_min(1e-300).sqrt()
    found = overlap / size[:, None] / size
    return found.fill_diagonal_(1.0)
