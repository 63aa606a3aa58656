"""Fits the weights of an attention together, to what the layer is to return: rounds of Gauss-Newton, layer by layer.

The closed forms merge keys, then values, then fit the output projection, each for itself. Here queries, keys, values
and output move at once, so that what the layer adds to the residual stream, of the drifted rows that it gets, makes
that again what it was. Whole sequences are needed: what a key does shows in every row behind it. Each round sees
sequences that none before it saw, and one sequence in ``_CHECKED`` is kept out and decides how far a step goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from slim.compiler.gauss_newton import Layer, Sample, improved, reads_best, stepped
from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.statistics import Passed, walk
from slim.compiler.statistics.batches import Batch, Calibration, sequences
from slim.compiler.stream import beside
from slim.passes.heads.attend import Region
from slim.passes.heads.find import Heads
from slim.passes.heads.layer import Made

_TOKENS = 8192  # that a round is fitted to
_SCORES = 1 << 27  # of all heads that a round computes, at most: each is kept about four times
_NUMBERS = 1 << 27  # of a layer's inputs and results that are held for all rounds
_CHECKED = 4
_DAMPING = 1.0  # a hundred times that of MLPs: attention is less linear
_EXACT = 1e-6  # of the energy, that is missing: rounding, which is nothing to fit to
_BEFORE, _AFTER = "missing before", "missing after"  # among the results of a walk; no weight is called that


@dataclass(frozen=True)
class Fit:
    """What a layer misses of what the residual stream is to get, as shares of its energy, before the rounds and after.

    Both are of all sequences. Where no round made it better they are the same, and the layer stayed as it was.
    """

    before: float
    after: float

    def __str__(self) -> str:
        if self.before < _EXACT:
            return "; the heads merge exactly, and nothing was left to fit"
        if self.after == self.before:
            return f"; fitted together: no round made the {self.before:.2%} less that the stream misses"
        return f"; fitted together: the stream misses {self.after:.2%}, and missed {self.before:.2%}"


def fit_together(
    program: Program,
    meant: Program,
    layers: Sequence[Heads],
    batches: Sequence[Batch],
    ctx: Context,
    rounds: int,
    asked_by: str,
) -> Iterator[Fit]:
    """Fits layers in the order of execution, each on what those before it give, and writes the new weights.

    Args:
        meant: the Program from before anything was merged. batches: calibration of two sequences at least, of which
            as many are taken as the rounds can use, from all over.
    """
    regions = {region.rows_out: region for region in map(Region.of, layers)}
    streams = {site: beside(region.heads.out) for site, region in regions.items()}
    whole = {site: [one.source, *one.outside, one.heads.out, *streams[site]] for site, one in regions.items()}
    makers = {site: min(region.linears) for site, region in regions.items()}
    few = replace(ctx, batches=Calibration(_taken(batches, layers, rounds)))
    label = f"{asked_by}: together"
    blocks = walk(
        program, list(regions), few, asked_by=label, meant=meant, grain="site", makers=makers, whole=whole
    )  # fmt: skip
    for block in blocks:
        (site,) = block.values
        region = regions[site]
        if not block.restored:
            samples = [_sample(program, region, streams[site], part) for part in _parts(block.passed, rounds)]
            start = _layer(program, region.heads)
            layer, fit = _fitted(start, samples[:-1], samples[-1], rounds)
            block.results |= {_BEFORE: torch.tensor(fit.before), _AFTER: torch.tensor(fit.after)}
            block.results |= {} if layer is start else _written(program, region.heads, layer)
        made = dict(block.results)
        fit = Fit(float(made.pop(_BEFORE)), float(made.pop(_AFTER)))
        for name, value in made.items():
            program.weights[name] = value
        yield fit


def _fitted(start: Layer, parts: Sequence[Sample], checked: Sample, rounds: int) -> tuple[Layer, Fit]:
    """The layer after ``rounds``, each over one of ``parts``.

    The reader at the start was fitted to what is ``checked`` too. So steps are compared with one that was not, and the
    last one is fitted to everything again.
    """
    every = [*parts, checked]
    before = start.missing(every)
    if before < _EXACT:
        return start, Fit(before, before)
    layer = reads_best(start, parts)
    missing = layer.missing([checked])
    for index in range(rounds):
        part = parts[index % len(parts)]
        found = improved(layer, missing, stepped(layer, part, index, _DAMPING), parts, checked)
        if found is not None:
            layer, missing = found
    layer = reads_best(layer, every)
    after = layer.missing(every)
    return (layer, Fit(before, after)) if after < before else (start, Fit(before, before))


# -- calibration -------------------------------------------------------------------------------------------------------


def _taken(batches: Sequence[Batch], layers: Sequence[Heads], rounds: int) -> list[Batch]:
    """Sequences from all over the calibration data, as many as the rounds can use and memory allows."""
    every = list(sequences(batches))
    tokens = sum(one.tokens for one in every) / len(every)
    scores = max(one.q.heads for one in layers) * tokens**2
    width = max(_width(one.out) + _width(one.q.linear.args[0]) for one in layers)
    a_round = max(min(_TOKENS / tokens, _SCORES / scores), 1.0)
    useful = math.ceil(rounds * a_round * _CHECKED / (_CHECKED - 1))
    held = int(_NUMBERS / (2 * width * tokens))
    count = min(len(every), max(2, min(useful, held)))
    return [every[index * len(every) // count] for index in range(count)]


def _width(value: Any) -> int:
    return int(value.meta["val"].shape[-1])


def _parts(passed: Sequence[Passed], rounds: int) -> list[list[Passed]]:
    """One for each round, where there are as many sequences, and then those that are kept out."""
    checked = list(passed[_CHECKED - 1 :: _CHECKED] or passed[-1:])
    seen = [one for one in passed if one not in checked]
    return [*(seen[index::rounds] for index in range(min(rounds, len(seen)))), checked]


# -- a layer -----------------------------------------------------------------------------------------------------------


def _layer(program: Program, heads: Heads) -> Layer:
    weights, made = program.weights, (heads.q, heads.k, heads.v)
    return Layer(
        lambda results: results[heads.q.weight],  # it differs from sample to sample
        {one.weight: weights[one.weight].float() for one in made},
        {one.weight: weights[one.bias].float() for one in made if one.bias is not None},
        weights[heads.out_weight].float(),
        None if heads.out_bias is None else weights[heads.out_bias].float(),
    )


def _written(program: Program, heads: Heads, layer: Layer) -> Made:
    made = dict(layer.weights) | {heads.out_weight: layer.reader}
    made |= {one.bias: layer.biases[one.weight] for one in (heads.q, heads.k, heads.v) if one.bias is not None}
    if heads.out_bias is not None and layer.shift is not None:
        made[heads.out_bias] = layer.shift
    return {name: value.to(program.weights.dtype(name)).contiguous() for name, value in made.items()}


def _sample(program: Program, region: Region, stream: Sequence[fx.Node], passed: Sequence[Passed]) -> Sample:
    """Sequences as rows, attention over them, and what they are to become."""
    names = [one.weight for one in (region.heads.q, region.heads.k, region.heads.v)]
    values = [one.now[region.source] for one in passed]
    outside = [{node: one.now[node] for node in region.outside} for one in passed]
    kept = [_real(one, value) for one, value in zip(passed, values, strict=True)]
    wanted = [_aim(one, region.heads.out, stream)[real] for one, real in zip(passed, kept, strict=True)]

    def body(made: Mapping[str, Tensor]) -> Tensor:
        counts = [value.shape[:-1].numel() for value in values]
        found = []
        for index, parts in enumerate(zip(*(made[name].split(counts) for name in names), strict=True)):
            shaped = [part.reshape(*values[index].shape[:-1], part.shape[-1]) for part in parts]
            found.append(_rows(region.run(program, shaped, outside[index]))[kept[index]])
        return torch.cat(found)

    return Sample(torch.cat([_rows(value).float() for value in values]), torch.cat(wanted), body)


def _aim(passed: Passed, out: fx.Node, stream: Sequence[fx.Node]) -> Tensor:
    """[rows, m]: what the layer returned in the model as it was, and what the stream it is added to has lost by now."""
    lost = [passed.meant[node].float() - passed.now[node].float() for node in stream]
    return torch.stack([_rows(value) for value in (passed.meant[out].float(), *lost)]).sum(0)


def _rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def _real(passed: Passed, value: Tensor) -> Tensor | slice:
    """The rows that are not of pad tokens."""
    if passed.real is None or bool(passed.real.all()) or value.shape[:-1].numel() != passed.real.numel():
        return slice(None)
    return passed.real.reshape(-1).nonzero()[:, 0]
