"""Attention in Triton: which kernels a region takes."""

from __future__ import annotations

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import same
from slim.codegen.triton.attention_decode import decode
from slim.codegen.triton.attention_prefill import prefill
from slim.codegen.triton.kernel import Form, Stage
from slim.codegen.triton.writer import Target, writes


@writes(Attention)
def _attention(region: Attention, target: Target) -> Stage:
    """One kernel where each row of the batch has one query; else keys are rotated and cached, then all are read."""
    _check(region)
    queries = region.q.shape[2]
    forms = []
    if region.rope is None or region.k_cache is not None:  # keys that are only kept for one call are not worth a form
        forms.append(Form([decode(region, target)], upto=1))
    if same(queries, 1) and forms:
        return Stage(forms, queries)
    kernels, temps = prefill(region, target)
    return Stage([*forms, Form(kernels)], queries, temps)


def _check(region: Attention) -> None:
    """What the kernels take for granted of a region."""
    names = ("q", "k", "v", "out", "k_cache", "v_cache")
    for name in names:
        view = getattr(region, name)
        if view is not None and not same(view.strides[3], 1):
            raise ValueError(f"{region.node}: the channels of {name} lie {view.strides[3]} apart, attention needs 1")
