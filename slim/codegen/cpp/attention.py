"""Kernels that call the library's attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from slim.codegen.cpp.text import STORED, number
from slim.codegen.cpp.writer import Writer, writes
from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import Size, View
from slim.compiler.patterns.terms import Term

_CACHE = {"float": "f32", "bf16": "bf16", "f16": "f16", "i8": "int8", "u8": "int4"}


@writes(Attention)
def _attention(writer: Writer, region: Attention) -> list[str]:
    text = writer.sizes.text
    batch, heads, queries, width = region.q.shape
    keys, most_keys = _keys(region)
    sizes = {
        "batch": batch, "heads": heads, "kv_heads": region.k.shape[1], "queries": queries, "keys": keys,
        "key_width": width, "value_width": region.v.shape[3], "most_keys": most_keys,
    }  # fmt: skip
    fields = {name: text(size) for name, size in sizes.items()} | {
        "start": text(region.start or 0),
        "scale": number(region.scale),
        "softcap": number(region.softcap or 0.0),
        "causal": "true" if region.causal else "false",
        "window": str(region.window or 0),
    }
    for name in ("q", "k", "v", "out"):
        fields |= _place(writer, name, getattr(region, name), name, ("batch", "head", "token"))
    for name, view in (("k_cache", region.k_cache), ("v_cache", region.v_cache)):
        if view is not None:
            fields |= _place(writer, name, view, name[0] + "c", ("batch", "head", "token"))
            fields[f"{name[0]}_format"] = f"Format::{_CACHE[STORED[view.buffer.dtype]]}"
    fields |= _place(writer, "k_scale", region.k_scale, "ks", ("batch", "head"))
    fields |= _place(writer, "v_scale", region.v_scale, "vs", ("batch", "head"))
    fields |= _place(writer, "k_offset", region.k_offset, "ko", ("head",))
    if region.rope is not None:
        cos, sin, interleaved = region.rope
        fields |= _place(writer, "cos", cos, "rope", ("batch", "token")) | _place(writer, "sin", sin)
        fields |= {"rope_width": text(2 * cos.shape[-1]), "interleaved": "true" if interleaved else "false"}
    fields |= _place(writer, "key_mask", region.key_mask, "mask", ("batch",), "u8")
    fields |= _place(writer, "bias", region.bias, "bias", ("batch", "head", "query", "key"))
    fields |= _place(writer, "sinks", region.sinks) | _place(writer, "slopes", region.slopes)
    fields |= _place(writer, "table", region.pages, "table", ("batch",)) | _place(writer, "lengths", region.lengths)
    if region.pages is not None:
        assert region.k_cache is not None
        fields |= {"columns": text(region.pages.shape[1]), "page_size": text(region.k_cache.shape[2])}
        fields |= {"fixed": str(region.fixed), "first": str(region.first)}
        fields |= _place(writer, "q_first", region.q_first, "qf", ("batch", "head", "token"))
    lines, choices = _pattern(writer, region)
    fields |= choices | _place(writer, "k_bounds", region.k_bounds, "kb", ("batch", "head"))
    fields |= _place(writer, "mass", region.mass, "mass", ("batch", "head"))
    if region.mass is not None:
        fields["votes"] = str(region.votes)
    fields["scratch"] = writer.arguments.text(None)
    more = (choices.get("top", "0"), choices.get("slash_columns", "0"), str(int(region.mass is not None)))
    scratch = (*(fields[name] for name in _SCRATCH), *more)
    writer.scratch.append(f"attention_scratch({', '.join(scratch)}, threads)")
    assigned = [f"a.{name} = {value};" for name, value in fields.items()]
    return [*lines, "slim::Attention a{};", *assigned, "attention(t, a);"]


_SCRATCH = ("batch", "heads", "kv_heads", "queries", "most_keys", "key_width", "value_width")


def _keys(region: Attention) -> tuple[Size, Size]:
    """(how many keys there are; 0 where each row has its own number, the most that there can be)."""
    if region.pages is not None:
        assert region.k_cache is not None
        return 0, region.pages.shape[1] * region.k_cache.shape[2]
    keys = region.k.shape[2] if region.start is None else region.start + region.q.shape[2]
    return keys, keys


def _pattern(writer: Writer, region: Attention) -> tuple[list[str], dict[str, str]]:
    """(the terms of each head, as constants, what else the kernel is to know of them)."""
    fields = {"skip": number(region.skip)} if region.skip else {}
    pattern = region.pattern
    if pattern is None:
        return [], fields
    heads = [pattern.of(head) for head in range(int(region.q.shape[1]))]
    lines: list[str] = []
    names: dict[tuple[Term, ...], str] = {}
    for terms in dict.fromkeys(heads):
        names[terms] = f"terms_{len(names)}" if terms else "nullptr"
        if terms:
            body = ", ".join(f"{{{', '.join(_term(term))}}}" for term in terms)
            lines.append(f"static const slim::Term {names[terms]}[] = {{{body}}};")
    each = ", ".join(f"{{{names[terms]}, {len(terms)}}}" for terms in heads)
    lines.append(f"static const slim::Pattern patterns[] = {{{each}}};")
    fields["patterns"] = "patterns"
    if pattern.top is not None:
        fields |= {"top": str(pattern.top.size), "share": str(pattern.top.share)}
    if pattern.vote is not None:
        fields |= {"slash_columns": str(pattern.vote.columns), "slashes": str(pattern.vote.slashes)}
    return lines, fields


def _term(term: Term) -> Iterator[str]:
    """The fields of the struct of that name in kernels.h."""
    yield f"slim::Keep::{term.name()}"
    values = dataclasses.astuple(term)
    yield from (str(value) for value in (*values, 0, 0, 0)[:3])


def _place(
    writer: Writer, name: str, view: View | None, prefix: str = "", dims: Sequence[str] = (), kind: str | None = None
) -> dict[str, str]:
    """The pointer ``name`` to a view, and its first strides as ``prefix_dim``; nothing for what is not there."""
    if view is None:
        return {}
    pointer = writer.arguments.pointer(view, writer.sizes, element=kind)
    return {name: pointer} | {
        f"{prefix}_{dim}": writer.sizes.text(stride) for dim, stride in zip(dims, view.strides, strict=False)
    }
