"""Fits linears that make something together with the one that reads it, to what the layer is to return.

y = D f(M x), with f the activation of an MLP or attention itself, is not linear in M, and so it is fitted by steps that
take it to be: Gauss-Newton. Each step is a damped least squares problem, solved by conjugate gradients over a sample,
layer by layer: there is no loss of the model, no labels and no backward run through it. Rows that are kept out decide
how far a step goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.func import vjp

from slim.compiler.statistics.paired import Paired

Named = dict[str, Tensor]
Body = Callable[[Mapping[str, Tensor]], Tensor]  # what the makers return, [r, each], to what the reader reads, [r, k]

STEPS = 4  # of conjugate gradients a round; twice as many gain nothing on tokens that were not seen
DAMPING = 0.01  # of the mean diagonal of the second moments, as in the closed forms
_SHORTEST = 0.1  # of a step, that is tried
_LEAST = torch.finfo(torch.float32).tiny
_CHECKED = 8  # one row in so many is kept out
_SEED = 0
_READER, _SHIFT = "(reader)", "(reader's bias)"  # among names of weights


@dataclass(frozen=True)
class Layer:
    """Makers M and their reader D.

    Attributes:
        weights: of the makers, [each, n], by name. biases: of those that have one, [each], by the weight's name.
        reader: [m, k]. shift: its bias, [m], or None.
    """

    body: Body
    weights: Named
    biases: Named
    reader: Tensor
    shift: Tensor | None

    @property
    def all(self) -> Named:
        biases = {_bias(name): value for name, value in self.biases.items()}
        shift = {} if self.shift is None else {_SHIFT: self.shift}
        return self.weights | biases | {_READER: self.reader} | shift

    def made(self, values: Named, rows: Tensor) -> Named:
        """What the makers return, with ``values`` in place of ``all``."""
        return {
            name: rows @ values[name].T + (values[_bias(name)] if name in self.biases else 0.0) for name in self.weights
        }

    def read(self, rows: Tensor) -> Tensor:
        """What the reader reads, [s, k]."""
        return self.body(self.made(self.all, rows))

    def __call__(self, values: Named, rows: Tensor) -> Tensor:
        found = self.body(self.made(values, rows)) @ values[_READER].T
        return found if self.shift is None else found + values[_SHIFT]

    def on(self, sample: Sample) -> Layer:
        """The same with what lies between makers and reader at these rows."""
        return self if sample.body is None else replace(self, body=sample.body)

    def moved(self, step: Named, length: float) -> Layer:
        new = {name: value + length * step[name] for name, value in self.all.items()}
        biases = {name: new[_bias(name)] for name in self.biases}
        return Layer(self.body, {name: new[name] for name in self.weights}, biases, new[_READER], new.get(_SHIFT))

    def missing(self, samples: Sequence[Sample]) -> float:
        """The share of the energy of what is wanted that it does not return."""
        lost = sum(float((s.wanted - self.on(s)(self.all, s.rows)).square().sum()) for s in samples)
        wanted = torch.cat([s.wanted for s in samples])
        energy = float((wanted - wanted.mean(0)).square().sum() if self.shift is not None else wanted.square().sum())
        return lost / energy if energy > 0.0 else 0.0


def _bias(name: str) -> str:
    return f"{name} (bias)"


@dataclass(frozen=True)
class Sample:
    """What a layer is fitted to, or tried on.

    Attributes:
        rows: [r, n]. wanted: [s, m], where s is r, or fewer where ``body`` leaves some out.
        body: of the layer at these rows, where they hang together; None is the layer's own.
    """

    rows: Tensor
    wanted: Tensor
    body: Body | None = None


def fitted(layer: Layer, rows: Tensor, wanted: Tensor, rounds: int) -> tuple[Layer, float]:
    """The layer that returns nearly ``wanted`` [r, m] for ``rows`` [r, n], and what it misses of the rows kept out.

    A round that makes those no better is not taken, and is the last. The reader that ``layer`` comes with may have been
    fitted to them, so what they are compared with, and what is missing, is of readers that were not. The last reader is
    fitted to all rows; where no round is taken ``layer`` stays as it is.
    """
    out = torch.arange(len(rows)) % _CHECKED == _CHECKED - 1
    seen, checked = Sample(rows[~out], wanted[~out]), Sample(rows[out], wanted[out])
    first = best = reads_best(layer, [seen])
    missing = best.missing([checked])
    for seed in range(rounds):
        found = improved(best, missing, stepped(best, seen, seed), [seen], checked)
        if found is None:
            break
        best, missing = found
    return (layer if best is first else reads_best(best, [seen, checked])), missing


def improved(
    layer: Layer, missing: float, step: Named, seen: Sequence[Sample], checked: Sample
) -> tuple[Layer, float] | None:
    """The layer moved along ``step``, and what it then misses of ``checked``; None where that is never less.

    At each length that is tried it has the reader that is best for what is ``seen``.
    """
    length = 1.0
    while length >= _SHORTEST:
        tried = reads_best(layer.moved(step, length), seen)
        found = tried.missing([checked])
        if found < missing:
            return tried, found
        length /= 2
    return None


def reads_best(layer: Layer, samples: Sequence[Sample]) -> Layer:
    """With the reader that is best for these makers: a closed form."""
    gram = cross = dense = mean = due = torch.zeros(())
    for sample in samples:
        read, wanted = layer.on(sample).read(sample.rows), sample.wanted
        gram, cross, dense = gram + read.T @ read, cross + wanted.T @ read, dense + wanted.T @ wanted
        mean, due = mean + read.sum(0), due + wanted.sum(0)
    count = sum(len(sample.wanted) for sample in samples)
    gram, cross, dense, mean, due = (total.double() / count for total in (gram, cross, dense, mean, due))
    if layer.shift is not None:
        gram, cross = gram - mean[:, None] * mean, cross - due[:, None] * mean
    paired, same = Paired(gram, cross, dense, mean, due), torch.eye(len(due)).double()
    reader = paired.fit(same, layer.reader.double())
    return replace(
        layer, reader=reader.float(), shift=None if layer.shift is None else paired.shift(same, reader).float()
    )


def stepped(layer: Layer, sample: Sample, seed: int, damping: float = DAMPING) -> Named:
    """To where the error, taken to be linear in all that is fitted, is least: conjugate gradients from nought.

    Args:
        seed: of the random signs that curvature is measured with. damping: how strongly weights are held where they
            are, as a share of the mean curvature.
    """
    slope = _Slope(layer.on(sample), sample.rows)
    curvature = _Curvature(layer, slope, seed, damping)

    def times(direction: Named) -> Named:
        return _plus(
            slope.back(slope.forth(direction)), 1.0, {n: curvature.damping[n] * direction[n] for n in direction}
        )

    left = slope.back(sample.wanted - slope.result)
    total = {name: torch.zeros_like(value) for name, value in left.items()}
    direction = eased = curvature.solve(left)
    size = _dot(left, eased)
    for _ in range(STEPS):
        image = times(direction)
        length = float(size / _dot(direction, image).clamp_min(_LEAST))
        total = _plus(total, length, direction)
        left = _plus(left, -length, image)
        eased, before = curvature.solve(left), size
        size = _dot(left, eased)
        direction = _plus(eased, float(size / before.clamp_min(_LEAST)), direction)
    return total


class _Slope:
    """The derivative of a layer's results by all that is fitted, at the rows x.

    Attributes:
        made: what the makers return. read: what the reader reads. result: what it returns.
    """

    def __init__(self, layer: Layer, rows: Tensor) -> None:
        self.layer, self.rows = layer, rows
        self.made = layer.made(layer.all, rows)
        self.read, back = vjp(layer.body, self.made)[:2]
        # The derivative forward is that of the one backward: it is linear, and keeps what it needs from call to call.
        self._back, self._forth = back, vjp(lambda slopes: back(slopes)[0], torch.zeros_like(self.read))[1]
        self.result = self.read @ layer.reader.T + (0.0 if layer.shift is None else layer.shift)

    def forth(self, direction: Named) -> Tensor:
        """[r, m]: how the results move."""
        (moved,) = self._forth(self.layer.made(direction, self.rows))
        found = moved @ self.layer.reader.T + self.read @ direction[_READER].T
        return found if self.layer.shift is None else found + direction[_SHIFT]

    def at_makers(self, results: Tensor) -> Named:
        """[r, each]: the gradient of E results . y by what the makers return, times the number of rows."""
        (found,) = self._back(results @ self.layer.reader)
        return cast("Named", found)

    def back(self, results: Tensor) -> Named:
        """The transpose of ``forth``, a mean over rows."""
        count, slopes = len(results), self.at_makers(results)
        found = {name: slope.T @ self.rows / count for name, slope in slopes.items()}
        found |= {_bias(name): slopes[name].sum(0) / count for name in self.layer.biases}
        found[_READER] = results.T @ self.read / count
        return found if self.layer.shift is None else found | {_SHIFT: results.mean(0)}


class _Curvature:
    """Kronecker factors of the second moments: of what enters a linear, and of how the result hangs on what it returns.

    Source: Martens and Grosse, K-FAC, 2015. They steer the conjugate gradients, and the damping is a part of them.
    """

    def __init__(self, layer: Layer, slope: _Slope, seed: int, damping: float) -> None:
        generator = torch.Generator().manual_seed(_SEED + seed)
        signs = torch.randint(0, 2, slope.result.shape, generator=generator) * 2.0 - 1.0  # E[s s^T] = 1
        self.entering, self.reading = _Factor(slope.rows, damping), _Factor(slope.read, damping)
        self.leaving = {name: _Factor(found, damping) for name, found in slope.at_makers(signs).items()}
        self.biases = {_bias(name): name for name in layer.biases}
        self.damping = {name: damping * factor.size * self.entering.size for name, factor in self.leaving.items()}
        self.damping |= {bias: damping * self.leaving[name].size for bias, name in self.biases.items()}
        self.damping |= {_READER: damping * self.reading.size, _SHIFT: 0.0}

    def solve(self, values: Named) -> Named:
        """About what the inverse makes of them."""
        found = dict(values)
        for name, factor in self.leaving.items():
            found[name] = factor.inverse @ values[name] @ self.entering.inverse
        for bias, name in self.biases.items():
            found[bias] = self.leaving[name].inverse @ values[bias]
        found[_READER] = values[_READER] @ self.reading.inverse
        return found


class _Factor:
    """E[v v^T] of rows v: its mean diagonal, and its inverse with ``damping`` times that added."""

    def __init__(self, rows: Tensor, damping: float) -> None:
        moments = (rows.T @ rows / len(rows)).double()
        self.size = float(moments.diagonal().mean().clamp_min(_LEAST))
        damped = moments + damping * self.size * torch.eye(len(moments)).double()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).float()


def _plus(a: Named, length: float, b: Named) -> Named:
    return {name: value + length * b[name] for name, value in a.items()}


def _dot(a: Named, b: Named) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()
