"""Fits the weights of an attention together, to what the layer is to return: rounds of Gauss-Newton, layer by layer.

The closed forms merge keys, then values, then fit the output projection, each for itself. Here queries, keys, values
and output move at once, so that what the layer adds to the residual stream, of the drifted rows that it gets, makes
that again what it was. Whole sequences are needed: what a key does shows in every row behind it. One sequence in
``_CHECKED`` is kept out and decides how far a step goes; a layer that no step makes better stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from slim.compiler.gauss_newton import Layer, Sample, fitted_to
from slim.compiler.passes_base import Context
from slim.compiler.program import Program
from slim.compiler.statistics import Passed, walk
from slim.compiler.statistics.batches import Batch, Calibration, sequences
from slim.compiler.stream import beside
from slim.passes.heads.attend import Region
from slim.passes.heads.find import Heads
from slim.passes.heads.layer import Made

_TOKENS = 8192  # that a layer is fitted to
_CHECKED = 4


@dataclass(frozen=True)
class Fit:
    """What became of a layer: ``made``, its new weights, and what it misses of what is wanted, before and after."""

    heads: Heads
    made: Made
    before: float
    after: float


def fit_together(
    program: Program, meant: Program, layers: Sequence[Heads], batches: Sequence[Batch], ctx: Context, rounds: int,
    asked_by: str,
) -> Iterator[Fit]:  # fmt: skip
    """Fits layers in order, each on what those before it give, and writes the new weights into ``program``.

    Args:
        meant: the Program from before anything was merged. batches: calibration, of which some are taken.
    """
    regions = {region.rows_out: region for region in map(Region.of, layers)}
    streams = {site: beside(region.heads.out) for site, region in regions.items()}
    whole = {
        site: [region.source, *region.outside, region.heads.out, *streams[site]] for site, region in regions.items()
    }
    few = replace(ctx, batches=Calibration(_taken(batches)))
    blocks = walk(
        program, list(regions), few, asked_by=asked_by, meant=meant, grain="site",
        makers={site: min(region.linears) for site, region in regions.items()}, whole=whole,
    )  # fmt: skip
    for block in blocks:
        (site,) = block.values
        region = regions[site]
        if not block.restored:
            start = _layer(program, region)
            seen, checked = (
                _sample(program, region, streams[site], part) for part in _parted(block.passed)
            )
            before = start.on(checked).missing(checked.rows, checked.wanted)
            layer, after = fitted_to(start, seen, checked, rounds)
            block.results |= _written(program, region.heads, layer) if after < before else {}
            block.results |= {_BEFORE: torch.tensor(before), _AFTER: torch.tensor(after)}
        made = dict(block.results)
        before, after = float(made.pop(_BEFORE)), float(made.pop(_AFTER))
        for name, value in made.items():
            program.weights[name] = value
        yield Fit(region.heads, made, before, after)


_BEFORE, _AFTER = "missing before", "missing after"  # among the results of a walk; no weight is called that


def _taken(batches: Sequence[Batch]) -> list[Batch]:
    """Sequences of about ``_TOKENS`` tokens, from all over the calibration data."""
    every = list(sequences(batches))
    mean = sum(one.tokens for one in every) / len(every)
    count = min(len(every), max(2, round(_TOKENS / mean)))
    return [every[int(i * len(every) / count)] for i in range(count)]


def _parted(passed: Sequence[Passed]) -> tuple[list[Passed], list[Passed]]:
    checked = list(passed[_CHECKED - 1 :: _CHECKED]) or list(passed[-1:])
    return [one for one in passed if one not in checked], checked


def _layer(program: Program, region: Region) -> Layer:
    heads = region.heads
    made = (heads.q, heads.k, heads.v)
    weights = program.weights
    return Layer(
        lambda results: results[heads.q.weight],  # until it is on a sample
        {one.weight: weights[one.weight].float() for one in made},
        {one.weight: weights[one.bias].float() for one in made if one.bias is not None},
        weights[heads.out_weight].float(),
        None if heads.out_bias is None else weights[heads.out_bias].float(),
    )


def _written(program: Program, heads: Heads, layer: Layer) -> Made:
    made = dict(layer.weights) | {heads.out_weight: layer.reader}
    made |= {
        one.bias: layer.biases[one.weight] for one in (heads.q, heads.k, heads.v) if one.bias is not None
    }
    if heads.out_bias is not None and layer.shift is not None:
        made[heads.out_bias] = layer.shift
    return {name: value.to(program.weights.dtype(name)).contiguous() for name, value in made.items()}


def _sample(program: Program, region: Region, stream: Sequence[fx.Node], passed: Sequence[Passed]) -> Sample:
    """Sequences as rows, and attention over them."""
    out = region.heads.out
    rows = [one.now[region.source] for one in passed]
    wanted = []
    for one in passed:
        aim = one.meant[out].float() + sum(one.meant[n].float() - one.now[n].float() for n in stream)
        wanted.append(_real(aim, one.real))
    names = [one.weight for one in (region.heads.q, region.heads.k, region.heads.v)]
    outside = [{node: one.now[node] for node in region.outside} for one in passed]
    counts = [value.shape[:-1].numel() for value in rows]

    def body(made: Mapping[str, Tensor]) -> Tensor:
        parts = zip(*(made[name].split(counts) for name in names), strict=True)
        found = []
        for part, value, held, one in zip(parts, rows, outside, passed, strict=True):
            shaped = [results.reshape(*value.shape[:-1], -1) for results in part]
            found.append(_real(region.run(program, shaped, held), one.real))
        return torch.cat(found)

    return Sample(torch.cat([value.reshape(-1, value.shape[-1]).float() for value in rows]), torch.cat(wanted), body)


def _real(value: Tensor, real: Tensor | None) -> Tensor:
    """[rows, m] without those of pad tokens."""
    if real is None or bool(real.all()) or value.shape[:2] != real.shape:
        return value.reshape(-1, value.shape[-1])
    return value[real]
