"""The heads of one layer as numbers: split by head, in float64, with biases as the weights of a channel that is 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.statistics import SiteStatistics
from slim.passes.heads.find import Heads, Projection
from slim.passes.heads.merge import Merged, Stack

Made = dict[str, Tensor]  # weight name -> its new value


@dataclass(frozen=True)
class Moments:
    """E[x x^T] of what enters the linears, as each of the three needs it; with a last row for biases.

    Attributes:
        whole: uncentred: of queries, and of keys that are rotated.
        keys: of keys that are not: what adds the same to the scores of all keys does not count.
        values: where the output has a bias, which takes up any constant, only what varies counts.
    """

    whole: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, statistics: SiteStatistics, heads: Heads) -> Moments:
        assert statistics.gram is not None
        gram, mean = statistics.gram.double(), statistics.mean.double()
        n = len(mean)
        whole = torch.ones(n + 1, n + 1, dtype=torch.float64)
        whole[:n, :n] = (gram + gram.T) / 2
        whole[:n, n] = whole[n, :n] = mean
        varying = torch.zeros_like(whole)
        varying[:n, :n] = whole[:n, :n] - mean[:, None] * mean
        sums_to_one = argument(heads.attention, "sinks") is None
        shifts = sums_to_one and argument(heads.attention, "softcap") is None
        return cls(whole, varying if shifts else whole, varying if sums_to_one and heads.out_bias else whole)


@dataclass(frozen=True)
class Numbers:
    """The weights of one layer.

    Attributes:
        q: [H, D, n + 1]; k: [G, D, n + 1]; v: [G, E, n + 1]; o: [m, H, E]; all float64.
        pairs: how many pairs of a head's channels are rotated, from the first on.
        interleaved: a pair is two neighbours, and not p and p + pairs.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    pairs: int
    interleaved: bool

    @classmethod
    def of(cls, program: Program, heads: Heads) -> Numbers:
        q, k, v = (_split(program, one) for one in (heads.q, heads.k, heads.v))
        out = program.weights[heads.out_weight].double()
        o = out.reshape(len(out), heads.q.heads, heads.v.width)
        rope = heads.k.rope
        if rope is None:
            return cls(q, k, v, o, 0, False)
        pairs = int(argument(rope, "cos").meta["val"].shape[-1])
        return cls(q, k, v, o, pairs, bool(argument(rope, "interleaved")))

    @property
    def share(self) -> int:
        return len(self.q) // len(self.k)


def _split(program: Program, one: Projection) -> Tensor:
    """[heads, width, n + 1], the bias last."""
    weight = program.weights[one.weight].double()
    bias = weight.new_zeros(len(weight)) if one.bias is None else program.weights[one.bias].double()
    return torch.cat([weight, bias[:, None]], -1).reshape(one.heads, one.width, -1)


# -- pairs of channels as complex ones ---------------------------------------------------------------------------------


def _turning(x: Tensor, pairs: int, interleaved: bool) -> Tensor:
    """[pairs, heads, 1, n] complex, of x [heads, D, n]."""
    turned = x[:, : 2 * pairs]
    a, b = (turned[:, 0::2], turned[:, 1::2]) if interleaved else (turned[:, :pairs], turned[:, pairs:])
    return torch.complex(a, b).transpose(0, 1).unsqueeze(2)


def _from_turning(z: Tensor, interleaved: bool) -> Tensor:
    """[heads, 2 pairs, n] of [pairs, heads, 1, n] complex."""
    z = z.squeeze(2).transpose(0, 1)
    return torch.stack([z.real, z.imag], 2).flatten(1, 2) if interleaved else torch.cat([z.real, z.imag], 1)


# -- stacks ------------------------------------------------------------------------------------------------------------


def _by_kv_head(each: Tensor, share: int) -> Tensor:
    """Sums [b, H, w, w] over the query heads of each kv head."""
    b, heads, w, _ = each.shape
    return each.reshape(b, heads // share, share, w, w).sum(2)


def _reader_energy(maps: Tensor, moment: Tensor, share: int) -> Tensor:
    """E[q q^H] of each query head, summed over those of a kv head."""
    return _by_kv_head(maps @ moment.to(maps.dtype) @ maps.mH, share)


@dataclass(frozen=True)
class Stacks:
    """What of the layer merges on its own: rotated keys, the keys' other channels, values; each with its moments."""

    turning: Stack | None
    still: Stack | None
    values: Stack

    @classmethod
    def of(cls, numbers: Numbers, moments: Moments) -> Stacks:
        share, pairs, r = numbers.share, numbers.pairs, 2 * numbers.pairs
        turning = still = None
        if pairs:
            q, k = (_turning(x, pairs, numbers.interleaved) for x in (numbers.q, numbers.k))
            turning = Stack.of(k, _reader_energy(q, moments.whole, share), moments.whole)
        if r < numbers.k.shape[1]:
            q, k = numbers.q[None, :, r:], numbers.k[None, :, r:]
            still = Stack.of(k, _reader_energy(q, moments.whole, share), moments.keys)
        o = numbers.o.transpose(0, 1)
        values = Stack.of(numbers.v[None], _by_kv_head((o.mT @ o)[None], share), moments.values)
        return cls(turning, still, values)

    @property
    def keys(self) -> list[Stack]:
        return [stack for stack in (self.turning, self.still) if stack is not None]

    def cost(self, group: Sequence[int]) -> float:
        """What merging ``group`` loses of keys and of values, each as a share of all there is."""
        kinds = (self.keys, [self.values])
        return sum(sum(stack.loss(group) for stack in kind) / _energy(kind) for kind in kinds)

    def pair_costs(self) -> Tensor:
        heads = self.values.maps.shape[1]
        costs = torch.zeros(heads, heads, dtype=torch.float64)
        for i in range(heads):
            for j in range(i):
                costs[i, j] = costs[j, i] = self.cost([i, j])
        return costs


def _energy(stacks: Sequence[Stack]) -> float:
    return max(sum(stack.energy for stack in stacks), 1e-300)


# -- merged weights ----------------------------------------------------------------------------------------------------

Merge = Callable[[Stack, Sequence[int]], Merged]


@dataclass(frozen=True)
class MergedLayer:
    """The new q, k, v and o, as Numbers has them.

    Attributes:
        order: the old query heads, as they stand now.
        key_loss, value_loss: what was lost, as shares of all there was.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    order: list[int]
    key_loss: float
    value_loss: float


def merge_layer(numbers: Numbers, stacks: Stacks, groups: Sequence[Sequence[int]], merge: Merge) -> MergedLayer:
    """Merges each group of kv heads into one; queries and the output projection absorb the turns."""
    share, r = numbers.share, 2 * numbers.pairs
    q, o = numbers.q.clone(), numbers.o.clone()
    k = numbers.k.new_zeros(len(groups), *numbers.k.shape[1:])
    v = numbers.v.new_zeros(len(groups), *numbers.v.shape[1:])
    lost = {"keys": 0.0, "values": 0.0}
    for index, group in enumerate(groups):
        members = _members(group, share)
        if stacks.turning is not None:
            made = merge(stacks.turning, group)
            lost["keys"] += made.loss
            k[index, :r] = _from_turning(made.shared[:, None], numbers.interleaved)[0]
            turned = _turning(numbers.q[members], numbers.pairs, numbers.interleaved)
            q[members, :r] = _from_turning(_turns(made, share).mH @ turned, numbers.interleaved)
        if stacks.still is not None:
            made = merge(stacks.still, group)
            lost["keys"] += made.loss
            k[index, r:] = made.shared[0]
            q[members, r:] = _turns(made, share)[0].mT @ numbers.q[members, r:]
        made = merge(stacks.values, group)
        lost["values"] += made.loss
        v[index] = made.shared[0]
        o[:, members] = torch.einsum("mhi,hij->mhj", numbers.o[:, members], _turns(made, share)[0])
    order = [head for group in groups for head in _members(group, share)]
    keys, values = (lost[name] / _energy(kind) for name, kind in (("keys", stacks.keys), ("values", [stacks.values])))
    return MergedLayer(q[order], k, v, o[:, order], order, keys, values)


def _members(group: Sequence[int], share: int) -> list[int]:
    """The query heads of some kv heads."""
    return [head for j in group for head in range(j * share, (j + 1) * share)]


def _turns(made: Merged, share: int) -> Tensor:
    """[b, query heads, w, w]."""
    return made.turns.repeat_interleave(share, 1)


def as_weights(program: Program, heads: Heads, layer: MergedLayer) -> Made:
    """The merged layer as weights of the Program, by name."""
    made: Made = {}
    for one, value in ((heads.q, layer.q), (heads.k, layer.k), (heads.v, layer.v)):
        rows = value.flatten(0, 1)
        made[one.weight] = rows[:, :-1].to(program.weights.dtype(one.weight))
        if one.bias is not None:
            made[one.bias] = rows[:, -1].to(program.weights.dtype(one.bias))
    made[heads.out_weight] = layer.o.flatten(1).to(program.weights.dtype(heads.out_weight))
    if heads.sinks is not None:
        sinks = program.weights[heads.sinks]
        made[heads.sinks] = sinks.flatten()[layer.order].reshape(sinks.shape)
    return made


def pooled(program: Program, heads: Heads, kv_heads: int) -> Made:
    """The means of neighbours' rows of k and v (and biases), as weights by name."""
    made: Made = {}
    for one in (heads.k, heads.v):
        for name in (one.weight, one.bias):
            if name is not None:
                rows = program.weights[name]
                grouped = rows.reshape(kv_heads, one.heads // kv_heads, one.width, -1).float().mean(1)
                made[name] = grouped.reshape(-1, *rows.shape[1:]).to(rows.dtype)
    return made
