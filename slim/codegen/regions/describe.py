"""Regions as people read them: one line each, what it reads, what was fused into it, what it writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from slim.codegen.regions.products import Linear, Matrix, Part, Source
from slim.codegen.regions.scalars import Op, Scalar, walk
from slim.codegen.regions.schedule import Attention, Foreign, Norm, Pointwise, Reduce, Region, Schedule
from slim.codegen.regions.views import Buffer, View


def describe(schedule: Schedule) -> str:
    """The whole schedule, a line a region.

    Example:
        >>> print(describe(lower(program)))
        linear rms(embedding) x [q_proj.weight f32[64,64]; k_proj.weight f32[32,64]] -> linear, linear_1
    """
    return "\n".join(line(region) for region in schedule.regions)


def line(region: Region) -> str:
    if isinstance(region, Linear):
        return f"linear {_source(region.source)} x [{'; '.join(_part(part) for part in region.parts)}]"
    if isinstance(region, Attention):
        return _attention(region)
    if isinstance(region, Foreign):
        return f"torch {region.node.target}: {_names(region.reads())} -> {_names(region.writes())}  # {region.reason}"
    kind = type(region).__name__.lower()
    bodies: list[Scalar] = []
    if isinstance(region, (Norm, Reduce)):
        kind = region.kind
        bodies = [body for body in (region.x, region.body) if body is not None]
    elif isinstance(region, Pointwise):
        bodies = [region.body]
    return f"{kind}{_fused(bodies)} {_names(region.reads())} -> {_names(region.writes())}"


def _source(source: Source) -> str:
    name = _name(source.view)
    if source.norm is not None:
        name = f"{source.norm.kind}({name})"
    if source.is_rounded:
        name = f"int8({name})"
    return name if source.expert is None else f"{name} by expert {_name(source.expert)}"


def _part(part: Part) -> str:
    weights = " & ".join(_matrix(product.matrix) for product in part.products)
    text = f"{weights}{_fused([part.body])}"
    if part.out is not None:
        text += f" -> {part.out.buffer.name}"
    if part.placed is not None:  # each result to the column that the order gives it
        text += f" by {part.placed.columns.buffer.name}{_fused([part.placed.body])} -> {part.placed.out.buffer.name}"
    return text


def _matrix(matrix: Matrix) -> str:
    group = f" g{matrix.group}" if matrix.group else ""
    zeros = " zeros" if matrix.zero_format else ""
    return f"{matrix.data.name} {matrix.format}[{matrix.m},{matrix.n}]{group}{zeros}"


def _attention(region: Attention) -> str:
    parts = (
        ("rope", region.rope), ("offset", region.k_offset), ("round", region.k_scale), ("append", region.k_cache),
        ("pages", region.pages), (f"keep {region.pattern}", region.pattern),
        (f"skip {region.skip}", region.skip or None),
    )  # fmt: skip
    fused = [name for name, there in parts if there is not None]
    text = f" {{{', '.join(fused)}}}" if fused else ""
    reads = ", ".join(_name(view) for view in (region.q, region.k, region.v))
    return f"attention{text} {reads} -> {region.out.buffer.name}"


def _fused(bodies: Iterable[Scalar]) -> str:
    names = [s.name for body in bodies for s in walk(body) if isinstance(s, Op) and s.name != "cast"]
    return f" {{{', '.join(names)}}}" if names else ""


def _names(buffers: Iterator[Buffer]) -> str:
    return ", ".join(dict.fromkeys(buffer.name for buffer in buffers))


def _name(view: View) -> str:
    return view.buffer.name
