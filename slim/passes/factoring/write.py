"""Puts a factored linear into a Program: ordinary linears, and where rows were picked, what orders their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, fx

from slim.compiler.program import Program
from slim.compiler.uses import LINEAR
from slim.passes.factoring.forms import Factors, Pivoted
from slim.passes.factoring.sites import Site

aten = torch.ops.aten

Made = dict[str, Tensor]

_PARTS = [field.name for form in (Factors, Pivoted) for field in fields(form)]


def as_weights(site: Site, form: Factors | Pivoted) -> Made:
    """The tensors of a form in the type of the weight that they stand for, by name."""
    named = {f"{site.name}_{part}": value for part, value in vars(form).items() if value is not None}
    dtype = site.dtype
    return {n: (v.to(dtype) if v.is_floating_point() else v).contiguous() for n, v in named.items()}


def install(program: Program, site: Site, made: Mapping[str, Tensor]) -> None:
    """Puts what ``as_weights`` made for ``site``, among ``made``, in place of its linears."""
    name, first = site.name, min(linear.node for linear in site.linears)  # fx orders nodes by their place
    for key in (f"{name}_{part}" for part in _PARTS):
        if key in made:
            program.weights[key] = made[key]
    if f"{name}_order" in made:
        program.facts.constants.add(f"{name}_order")
        result = _pivoted(program, first, site)
    else:
        inner = _linear(program, first, site.rows, f"{name}_inner")
        result = _linear(program, first, inner, f"{name}_outer", f"{name}_bias")
    start = 0
    for linear in site.linears:
        own = result if len(site.linears) == 1 else _columns(program, first, result, start, start + linear.results)
        linear.node.replace_all_uses_with(own)
        start += linear.results
    for linear in site.linears:
        program.graph.erase_node(linear.node)


def _columns(program: Program, before: fx.Node, result: fx.Node, start: int, stop: int) -> fx.Node:
    """Some of the results, of a linear that stands for several."""
    return program.insert(before, aten.slice.Tensor, result, result.meta["val"].dim() - 1, start, stop, like=before)


def _pivoted(program: Program, before: fx.Node, site: Site) -> fx.Node:
    name = site.name
    picked = _linear(program, before, site.rows, f"{name}_pivots", f"{name}_bias")
    rest = _linear(program, before, picked, f"{name}_rest", f"{name}_rest_bias")
    both = program.insert(before, aten.cat.default, [picked, rest], -1, like=before)
    order = program.weight_node(f"{name}_order")
    return program.insert(before, aten.index_select.default, both, -1, order, like=before)


def _linear(program: Program, like: fx.Node, rows: object, weight: str, bias: str | None = None) -> fx.Node:
    """A linear before ``like``; with a bias, if there is one of that name."""
    names = [weight] if bias is None or bias not in program.weights else [weight, bias]
    return program.insert(like, LINEAR, rows, *map(program.weight_node, names), like=like)
