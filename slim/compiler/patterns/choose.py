"""Terms that choose by looking: which blocks, which columns and which distances the queries of a call keep."""

from __future__ import annotations

import torch
from torch import Tensor

VOTERS = 64  # queries that choose columns and slashes


def top_blocks(q: Tensor, k: Tensor, real: Tensor, t: Tensor, size: int, share: int) -> Tensor:
    """bool [B, G, S, T]: which keys the best blocks before a query's own hold.

    Args:
        q: scaled queries [B, H, S, D]. k: keys [B, G, T, D], G dividing H; all heads of a group choose together.
        real: bool [B, T], which keys are there.
        t: token of each query [B, S], counted like the keys from the first real one.
        size: keys of a block. share: of n blocks before its own a query keeps the best ceil(n / share).
    """
    groups, keys = k.shape[1], k.shape[2]
    j = torch.cumsum(real, 1) - 1  # token of each key
    count = -(-keys // size)
    low, high = block_bounds(k, j, real, size, count)
    queries = q.unflatten(1, (groups, -1))
    reach = torch.maximum(queries.unsqueeze(-2) * low[:, :, None, None], queries.unsqueeze(-2) * high[:, :, None, None])
    score = reach.sum(-1)  # [B, G, heads of a group, S, blocks]
    own = torch.div(t, size, rounding_mode="floor")[:, None, :, None]
    before = torch.arange(count, device=q.device) < own  # [B, 1, S, blocks]
    score = score.masked_fill(~before[:, :, None], float("-inf"))
    best = score.amax(-1, keepdim=True)
    ranks = (score - best.masked_fill(best == float("-inf"), 0.0)).amax(2)  # each head's best is as good as another's
    wanted = -(-own // share)
    ordered = ranks.sort(-1, descending=True).values
    last = ordered.gather(-1, (wanted.expand(-1, groups, -1, -1) - 1).clamp(0, count - 1))
    keep = (ranks >= last) & before & (wanted > 0)
    index = torch.div(j, size, rounding_mode="floor").clamp_min(0)[:, None, None].expand(-1, groups, t.shape[1], -1)
    return keep.gather(-1, index)


def block_bounds(k: Tensor, j: Tensor, real: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest number of each channel in each block of keys: [B, G, blocks, D] twice."""
    batch, groups, _, width = k.shape
    block = torch.div(j, size, rounding_mode="floor").clamp_min(0)[:, None, :, None].expand_as(k)
    ends = []
    for reduce, fill in (("amin", float("inf")), ("amax", float("-inf"))):
        held = k.masked_fill(~real[:, None, :, None], fill)
        empty = k.new_full((batch, groups, count, width), fill)
        end = empty.scatter_reduce(2, block, held, reduce)
        ends.append(end.masked_fill(end == fill, 0.0))
    return ends[0], ends[1]


def voted(q: Tensor, k: Tensor, seen: Tensor, columns: int, slashes: int) -> Tensor:
    """bool [B, H, S, T]: the columns and the slashes that the last queries look at most.

    Args:
        q: scaled queries [B, H, S, D], S at least ``VOTERS``. k: keys [B, H, T, D], of tokens T - S and on.
        seen: bool [B or 1, 1, S, T], what may be seen at all.
    """
    queries, keys = q.shape[2], k.shape[2]
    scores = (q[:, :, -VOTERS:] @ k.transpose(2, 3)).float()
    looks = torch.softmax(scores.masked_fill(~seen[:, :, -VOTERS:], float("-inf")), -1).nan_to_num(0.0)
    column = _highest(looks.sum(2), columns)
    rows = torch.arange(keys - VOTERS, keys, device=q.device)[:, None]
    apart = (rows - torch.arange(keys, device=q.device)).clamp_min(0).expand_as(looks).flatten(2)
    slash = _highest(looks.new_zeros(*looks.shape[:2], keys).scatter_add(2, apart, looks.flatten(2)), slashes)
    slash[..., 0] = True
    every = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
    return column[:, :, None] | slash[:, :, every.clamp_min(0)]


def _highest(sums: Tensor, count: int) -> Tensor:
    """Which numbers of the last dimension are among the ``count`` highest; all that equal the last of them are."""
    last = sums.topk(min(count, sums.shape[-1]), -1).values[..., -1:]
    return sums >= last
