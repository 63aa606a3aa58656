"""Kernels that call the library's attention."""

from __future__ import annotations

from collections.abc import Sequence

from slim.codegen.cpp.text import STORED, number
from slim.codegen.cpp.writer import Writer, writes
from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import View

_CACHE = {"float": "f32", "bf16": "bf16", "f16": "f16", "i8": "int8", "u8": "int4"}


@writes(Attention)
def _attention(writer: Writer, region: Attention) -> list[str]:
    text = writer.sizes.text
    cached = region.start is not None
    keys = region.k.shape[2] if region.start is None else region.start + region.q.shape[2]
    batch, heads, queries, width = region.q.shape
    sizes = (batch, heads, region.k.shape[1], queries, keys, width, region.v.shape[3])
    names = ("batch", "heads", "kv_heads", "queries", "keys", "key_width", "value_width")
    fields = dict(zip(names, map(text, sizes), strict=True)) | {
        "start": text(region.start) if cached else "0",
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
    fields["scratch"] = writer.arguments.text(None)
    writer.scratch.append(f"attention_scratch({', '.join(text(sizes[names.index(n)]) for n in _SCRATCH)}, threads)")
    return ["slim::Attention a{};", *(f"a.{name} = {value};" for name, value in fields.items()), "attention(t, a);"]


_SCRATCH = ("batch", "heads", "kv_heads", "queries", "keys", "key_width", "value_width")


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
