"""Attention in Triton: which kernels a region takes."""

from __future__ import annotations

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import same
from slim.codegen.triton.attention_choices import Choices, choices_of, keeps_bounds, without_votes
from slim.codegen.triton.attention_decode import decode
from slim.codegen.triton.attention_mass import level_of, weigh
from slim.codegen.triton.attention_prefill import prefill
from slim.codegen.triton.kernel import Form, Stage
from slim.codegen.triton.writer import Target, writes
from slim.compiler.patterns.choose import VOTERS


@writes(Attention)
def _attention(region: Attention, target: Target) -> Stage:
    """Few kernels where each row of the batch has one query; else keys are rotated and cached, then all are read."""
    _check(region)
    queries, few = region.q.shape[2], without_votes(region)
    forms: list[Form] = []
    levels = level_of(region)
    temps = [] if levels is None else [levels.buffer]
    weighing = [] if levels is None else [weigh(region, target, levels)]
    if _steps(region):
        choices = choices_of(few, single=True)
        forms, temps = [Form([*decode(few, target, choices, levels), *weighing], upto=1)], temps + choices.buffers
        if same(queries, 1):
            return Stage(forms, queries, temps)
    choices = choices_of(region, single=False)
    temps += choices.buffers
    looks: list[tuple[Attention, Choices, int | None]] = [(region, choices, None)]
    if few is not region:
        looks.insert(0, (few, Choices(tops=choices.tops), VOTERS - 1))
    for look, chosen, upto in looks:
        kernels, own = prefill(look, target, chosen, levels)
        forms.append(Form([*kernels, *weighing], upto))
        temps += own
    return Stage(forms, queries, temps)


def _steps(region: Attention) -> bool:
    """Whether one query is worth kernels of its own: keys, or bounds of them, that are kept for one call are not."""
    if region.k_cache is None:
        return region.rope is None and region.k_bounds is None
    return region.k_bounds is None or keeps_bounds(region)


def _check(region: Attention) -> None:
    """What the kernels take for granted of a region."""
    names = ("q", "k", "v", "out", "k_cache", "v_cache")
    for name in names:
        view = getattr(region, name)
        if view is not None and not same(view.strides[3], 1):
            raise ValueError(f"{region.node}: the channels of {name} lie {view.strides[3]} apart, attention needs 1")
