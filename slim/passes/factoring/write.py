"""Puts a factored linear into a Program: ordinary linears, and where rows were picked, what orders their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

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
    """Puts what ``as_weights`` made for ``site``, among ``made``, in place of its linears.

    The node of each linear stays and becomes the last of what stands for it: others, and a walk, know it.
    """
    name, first = site.name, min(linear.node for linear in site.linears)  # fx orders nodes by their place
    for key in (f"{name}_{part}" for part in _PARTS):
        if key in made:
            program.weights[key] = made[key]
    target, args = _pivoted(program, first, site) if f"{name}_order" in made else _plain(program, first, site)
    if len(site.linears) == 1:
        become(program, first, target, args)
        return
    whole = program.insert(first, target, *args, like=first)
    start, dim = 0, whole.meta["val"].dim() - 1
    for linear in site.linears:
        become(program, linear.node, aten.slice.Tensor, (whole, dim, start, start + linear.results))
        start += linear.results


def become(program: Program, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Makes ``node`` another operation, whose result is read where its own was."""
    node.target, node.args, node.kwargs = target, args, {}
    node.meta["val"] = program.typer.value(node, program.weights)


Last = tuple[Any, tuple[Any, ...]]  # an operation and its arguments


def _plain(program: Program, before: fx.Node, site: Site) -> Last:
    inner = program.insert(before, LINEAR, *_args(program, site.rows, f"{site.name}_inner"), like=before)
    return LINEAR, _args(program, inner, f"{site.name}_outer", f"{site.name}_outer_bias")


def _pivoted(program: Program, before: fx.Node, site: Site) -> Last:
    name = site.name
    program.facts.constants.add(f"{name}_order")
    picked = program.insert(
        before, LINEAR, *_args(program, site.rows, f"{name}_pivots", f"{name}_pivots_bias"), like=before
    )
    rest = program.insert(before, LINEAR, *_args(program, picked, f"{name}_rest", f"{name}_rest_bias"), like=before)
    both = program.insert(before, aten.cat.default, [picked, rest], -1, like=before)
    return aten.index_select.default, (both, -1, program.weight_node(f"{name}_order"))


def _args(program: Program, rows: fx.Node, weight: str, bias: str | None = None) -> tuple[fx.Node, ...]:
    """Of a linear; with a bias, if there is one of that name."""
    names = [weight] if bias is None or bias not in program.weights else [weight, bias]
    return rows, *map(program.weight_node, names)
