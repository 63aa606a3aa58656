"""How heads merge: the closed forms, for values, for keys that are rotated and for keys that are not.

All three are one problem. Each old head h is a map W_h [w, n] of the layer's input, W their stack [h w, n], and what
reads them (queries, or the output projection) weighs their channels by a matrix E [h w, h w], which has blocks beside
its diagonal where errors of two heads add up. Wanted are one shared map S [w, n] and, for each head, a turn T_h [w, w]
that its reader can absorb, such that

    tr(E (W - T S) C (W - T S)^H)

is least, with C = E[x x^T]. With E = R R, R hermitian, this is a low-rank approximation of R W C^(1/2), which the
eigenvectors U of its Gram matrix solve: S = U^H R W and T = R^-1 U. The loss is the sum of the eigenvalues left out.
A pair of channels that RoPE rotates is one complex channel, and only complex factors commute with the rotation: there
w is 1, and each frequency is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_FLOOR = 1e-14  # of the largest eigenvalue: what lies below is rounding


@dataclass(frozen=True)
class Merged:
    """What became of one group of heads.

    Attributes:
        shared: [b, w, n], the one map.
        turns: [b, heads, w, w]: head h is about ``turns[:, h] @ shared``.
        loss: what that loses, of the stack's energy.
    """

    shared: Tensor
    turns: Tensor
    loss: float


@dataclass(frozen=True)
class Stack:
    """The maps of all heads of a layer, and what their merging costs.

    Attributes:
        maps: [b, heads, w, n], W_h; b independent problems.
        readers: [b, heads, w, heads, w], E.
        plain: [b, heads, w, heads, w], W C W^H.
        moment: [n, n], C.
    """

    maps: Tensor
    readers: Tensor
    plain: Tensor
    moment: Tensor

    @classmethod
    def of(cls, maps: Tensor, readers: Tensor, moment: Tensor) -> Stack:
        """For maps [b, heads, w, n], their readers' weights [b, heads, w, heads, w], and C [n, n]."""
        b, heads, w, n = maps.shape
        flat = maps.reshape(b, heads * w, n)
        plain = (flat @ moment.to(maps.dtype)) @ flat.mH
        return cls(maps, readers, plain.reshape(b, heads, w, heads, w), moment)

    def _roots(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """R and its pseudo-inverse, [b, g w, g w]."""
        values, vectors = torch.linalg.eigh(_among(self.readers, group))
        values = values.clamp_min(0.0)
        kept = values > _FLOOR * values.amax()
        roots = values.sqrt()
        inverses = torch.where(kept, 1.0 / roots.clamp_min(torch.finfo(roots.dtype).tiny), 0.0)
        root, inverse = ((vectors * each.unsqueeze(-2).to(vectors.dtype)) @ vectors.mH for each in (roots, inverses))
        return root, inverse

    def _gram(self, group: Sequence[int], root: Tensor | None = None) -> Tensor:
        """[b, g w, g w], of R W C^(1/2)."""
        root = self._roots(group)[0] if root is None else root
        gram = root @ _among(self.plain, group) @ root
        return (gram + gram.mH) / 2

    @cached_property
    def energy(self) -> float:
        """The loss if nothing were kept."""
        heads = range(self.maps.shape[1])
        return sum(float(self._gram([h]).diagonal(dim1=-2, dim2=-1).sum().real) for h in heads)

    def spectrum(self) -> Tensor:
        """[heads]: the share of the first w, the second w, ... eigenvalues when all heads merge; sums to 1."""
        _, heads, w, _ = self.maps.shape
        values = torch.linalg.eigvalsh(self._gram(range(heads))).flip(-1).clamp_min(0.0)
        shares = values.unflatten(-1, (heads, w)).sum((0, 2))
        return shares / shares.sum().clamp_min(torch.finfo(shares.dtype).tiny)

    def loss(self, group: Sequence[int]) -> float:
        """What the best merging of ``group`` loses."""
        values = torch.linalg.eigvalsh(self._gram(group))
        return float(values[:, : -self.maps.shape[2]].clamp_min(0.0).sum())

    def merge(self, group: Sequence[int]) -> Merged:
        """The best merging of ``group``."""
        b, _, w, n = self.maps.shape
        root, inverse = self._roots(group)
        values, vectors = torch.linalg.eigh(self._gram(group, root))
        lost, values = float(values[:, :-w].clamp_min(0.0).sum()), values[:, -w:].clamp_min(0.0)
        u = vectors[:, :, -w:]
        shared = u.mH @ (root @ self.maps[:, list(group)].reshape(b, -1, n))
        turns = (inverse @ u).reshape(b, len(group), w, w)
        gauge = self._gauge(group, values).to(shared.dtype)
        return Merged(shared * gauge.unsqueeze(-1), turns / gauge[:, None, None, :], lost)

    def _gauge(self, group: Sequence[int], values: Tensor) -> Tensor:
        """[b, w]: any factor may move from the turns to the shared map; this one gives it the heads' mean energy.

        Between its channels it lets the map and its reader share what sets them apart, so that neither has a wide
        range of magnitudes.
        """
        floor = values.amax(-1, keepdim=True) * 1e-12
        values = torch.where(floor > 0.0, values.maximum(floor), 1.0)
        relative = values.pow(-0.25)
        plain = torch.stack([self.plain[:, h, :, h].diagonal(dim1=-2, dim2=-1).real.sum(-1) for h in group])
        wanted, found = plain.mean(0), (values * relative**2).sum(-1)
        scale = torch.where(wanted > 0.0, (wanted / found).sqrt(), 1.0)
        return relative * scale.unsqueeze(-1)

    def residual(self, group: Sequence[int], shared: Tensor, turns: Tensor) -> float:
        """What a merging of ``group`` loses, however it was made."""
        error = self._roots(group)[0] @ (self.maps[:, list(group)] - turns @ shared[:, None]).flatten(1, 2)
        return float(((error @ self.moment.to(error.dtype)) * error.conj()).real.sum())


def _among(matrix: Tensor, group: Sequence[int]) -> Tensor:
    """[b, g w, g w]: the rows and columns of some heads."""
    index = torch.tensor(group)
    return matrix[:, index][:, :, :, index].flatten(3, 4).flatten(1, 2)


def apart(energy: Tensor) -> Tensor:
    """Readers [b, heads, w, heads, w] that each see one head only, of E_h [b, heads, w, w]."""
    b, heads, w, _ = energy.shape
    readers = energy.new_zeros(b, heads, w, heads, w)
    for h in range(heads):
        readers[:, h, :, h] = energy[:, h]
    return readers


def aligned_mean(stack: Stack, group: Sequence[int], rounds: int = 50) -> Merged:
    """Generalised Procrustes: unitary turns that bring the heads together, their mean, and its norm restored."""
    index = torch.tensor(group)
    plain = stack.plain[:, index][:, :, :, index]
    b, g, w = plain.shape[:3]
    turns = torch.eye(w, dtype=plain.dtype).repeat(b, g, 1, 1)
    for _ in range(rounds):
        onto = torch.einsum("bgij,bgjhk->bhik", turns, plain)
        u, _, vh = torch.linalg.svd(onto)
        turns = u @ vh
    maps = stack.maps[:, index]
    mean = (turns @ maps).mean(1)
    wanted = maps.abs().square().sum((0, 2, 3)).sqrt().mean()
    shared = mean * (wanted / mean.abs().square().sum().sqrt())
    return Merged(shared, turns.mH, stack.residual(group, shared, turns.mH))
