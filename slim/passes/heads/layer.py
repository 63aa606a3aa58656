"""The heads of one layer as numbers: split by head, in float64, with biases as the weights of a channel that is 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.rules import argument
from slim.compiler.statistics import SiteStatistics
from slim.compiler.statistics.attention import Attended
from slim.passes.heads.distances import Distances, share_keys
from slim.passes.heads.find import Heads, Projection
from slim.passes.heads.merge import Merged, Stack, apart

slim = torch.ops.slim

_LONGEST = 2048  # tokens; beyond this distances hardly differ
_FAR = 0.05  # how much all distances that the model is made for count, beside those that calibration shows

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
        alike: [H, H], how alike query heads look, from 0 to 1: how far what two of them get varies together.
        distances: what the rotation does on average; None where there is none, or its frequencies are computed.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    pairs: int
    interleaved: bool
    alike: Tensor
    distances: Distances | None = None

    @classmethod
    def of(cls, program: Program, heads: Heads, attended: Attended | None = None) -> Numbers:
        """Of a layer; without ``attended`` heads look at all distances alike, and not at the same."""
        q, k, v = (_split(program, one) for one in (heads.q, heads.k, heads.v))
        out = program.weights[heads.out_weight].double()
        o = out.reshape(len(out), heads.q.heads, heads.v.width)
        alike = torch.eye(len(q), dtype=torch.float64) if attended is None else attended.alike
        rope = heads.k.rope
        if rope is None:
            return cls(q, k, v, o, 0, False, alike)
        pairs = int(argument(rope, "cos").meta["val"].shape[-1])
        distances = None if attended is None else _distances(program, heads, attended.reach)
        return cls(q, k, v, o, pairs, bool(argument(rope, "interleaved")), alike, distances)

    @property
    def share(self) -> int:
        return len(self.q) // len(self.k)


def _distances(program: Program, heads: Heads, reach: Tensor) -> Distances | None:
    """Read off the table of angles, at the distances that heads look at, and a little at all the model is made for."""
    rope = heads.k.rope
    assert rope is not None
    table = argument(rope, "cos").args[0]
    frequencies = table.args[1] if isinstance(table, fx.Node) and table.target is slim.rope_table.default else None
    name = program.weight_of(frequencies)
    if name is None:
        return None
    made_for = (program.facts.config or {}).get("max_position_embeddings")
    longest = min(made_for, _LONGEST) if isinstance(made_for, int) and made_for > 0 else _LONGEST
    causal, interleaved = (
        bool(argument(node, what)) for node, what in ((heads.attention, "causal"), (rope, "interleaved"))
    )
    return Distances.of(program.weights[name], heads.k.width, interleaved, _by_kv(reach, heads.share, longest), causal)


def _by_kv(reach: Tensor, share: int, longest: int) -> Tensor:
    """[G, distances] of [H, distances]; far ones weigh as 1 / (1 + d), which is about how attention falls off."""
    length = max(reach.shape[1], longest)
    falling = 1.0 / (1.0 + torch.arange(length, dtype=torch.float64))
    seen = torch.nn.functional.pad(reach.unflatten(0, (-1, share)).mean(1), (0, length - reach.shape[1]))
    return (1.0 - _FAR) * seen + _FAR * falling / falling.sum()


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


def _queries(numbers: Numbers, maps: Tensor, moments: Moments) -> Tensor:
    """[b, G, w, w]: E[q q^H], summed over the query heads of a kv head, each as much as its values put out."""
    energy = maps @ moments.whole.to(maps.dtype) @ maps.mH
    weighed = energy * _importance(numbers, moments)[:, None, None].to(maps.dtype)
    return weighed.unflatten(1, (-1, numbers.share)).sum(2)


def _importance(numbers: Numbers, moments: Moments) -> Tensor:
    """[H], 1 on average: the energy of what a query head adds to the output, were it to look at one token each time."""
    v = numbers.v.repeat_interleave(numbers.share, 0)
    put_out = numbers.o.transpose(0, 1) @ v
    energy = ((put_out @ moments.values) * put_out).sum((1, 2))
    mean = energy.mean()
    return energy / mean if mean > 0.0 else torch.ones_like(energy)


def _outputs(numbers: Numbers) -> Tensor:
    """[1, G, w, G, w]: how what is wrong with two kv heads' values adds up in the output."""
    m, heads, w = numbers.o.shape
    flat = numbers.o.reshape(m, heads * w)
    whole = (flat.T @ flat).reshape(heads, w, heads, w) * numbers.alike[:, None, :, None]
    groups = heads // numbers.share
    return whole.reshape(groups, numbers.share, w, groups, numbers.share, w).sum((1, 4))[None]


@dataclass(frozen=True)
class Stacks:
    """What of the layer merges on its own: rotated keys, the keys' other channels, values; each with its moments."""

    turning: Stack | None
    still: Stack | None
    values: Stack

    @classmethod
    def of(cls, numbers: Numbers, moments: Moments) -> Stacks:
        pairs, r = numbers.pairs, 2 * numbers.pairs
        turning = still = None
        if pairs:
            q, k = (_turning(x, pairs, numbers.interleaved) for x in (numbers.q, numbers.k))
            turning = Stack.of(k, apart(_queries(numbers, q, moments)), moments.whole)
        if r < numbers.k.shape[1]:
            q, k = numbers.q[None, :, r:], numbers.k[None, :, r:]
            still = Stack.of(k, apart(_queries(numbers, q, moments)), moments.keys)
        values = Stack.of(numbers.v[None], _outputs(numbers), moments.values)
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
        groups: the old kv heads that became each new one.
        key_loss, value_loss: what was lost, as shares of all there was.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    order: list[int]
    groups: list[list[int]]
    key_loss: float
    value_loss: float


def merge_layer(
    numbers: Numbers, stacks: Stacks, groups: Sequence[Sequence[int]], merge: Merge, moments: Moments | None = None
) -> MergedLayer:
    """Merges each group of kv heads into one; queries and the output projection absorb the turns.

    Args:
        moments: refine keys over all frequencies together, where that is known how.
    """
    q, o = numbers.q.clone(), numbers.o.clone()
    k, v, lost = [], [], {"keys": 0.0, "values": 0.0}
    for group in groups:
        members = _members(group, numbers.share)
        keys = _merge_keys(numbers, stacks, group, merge, moments)
        values = merge(stacks.values, group)
        k.append(keys.shared[0])
        v.append(values.shared[0])
        q[members] = _by_query_head(keys, numbers.share).mT @ numbers.q[members]
        o[:, members] = torch.einsum("mhi,hij->mhj", numbers.o[:, members], _by_query_head(values, numbers.share))
        lost = {"keys": lost["keys"] + keys.loss, "values": lost["values"] + values.loss}
    order = [head for group in groups for head in _members(group, numbers.share)]
    shares = lost["keys"] / _energy(stacks.keys), lost["values"] / _energy([stacks.values])
    return MergedLayer(q[order], torch.stack(k), torch.stack(v), o[:, order], order, [*map(list, groups)], *shares)


def _merge_keys(
    numbers: Numbers, stacks: Stacks, group: Sequence[int], merge: Merge, moments: Moments | None
) -> Merged:
    """A group's keys as one real map of all D channels: the rotated ones and the others, each on their own at first."""
    width, r = numbers.k.shape[1], 2 * numbers.pairs
    shared = numbers.k.new_zeros(width, numbers.k.shape[-1])
    turns = numbers.k.new_zeros(len(group), width, width)
    loss = 0.0
    if stacks.turning is not None:
        made = merge(stacks.turning, group)
        shared[:r] = _from_turning(made.shared[:, None], numbers.interleaved)[0]
        turns[:, :r, :r] = _as_rotations(made.turns[:, :, 0, 0], numbers.interleaved)
        loss += made.loss
    if stacks.still is not None:
        made = merge(stacks.still, group)
        shared[r:], turns[:, r:, r:] = made.shared[0], made.turns[0]
        loss += made.loss
    if moments is not None and numbers.distances is not None and len(group) > 1:
        maps = numbers.k[list(group)]
        energy = _queries(numbers, numbers.q[None], moments)[0, list(group)]
        shared, turns, loss = share_keys(numbers.distances.among(group), maps, energy, moments.whole, shared, turns)
    return Merged(shared[None], turns[None], loss)


def _as_rotations(factors: Tensor, interleaved: bool) -> Tensor:
    """[heads, 2 pairs, 2 pairs] real, of complex factors [pairs, heads]: multiplying by a + bi is [[a, -b], [b, a]]."""
    a, b = torch.diag_embed(factors.real.T), torch.diag_embed(factors.imag.T)
    whole = torch.cat([torch.cat([a, -b], 2), torch.cat([b, a], 2)], 1)
    if not interleaved:
        return whole
    pairs = len(factors)
    place = torch.arange(2 * pairs).reshape(2, pairs).T.flatten()  # 0, pairs, 1, pairs + 1, ...
    return whole[:, place][:, :, place]


def _members(group: Sequence[int], share: int) -> list[int]:
    """The query heads of some kv heads."""
    return [head for j in group for head in range(j * share, (j + 1) * share)]


def _by_query_head(made: Merged, share: int) -> Tensor:
    """The turns [query heads, w, w] of a merging that is one problem."""
    return made.turns[0].repeat_interleave(share, 0)


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
