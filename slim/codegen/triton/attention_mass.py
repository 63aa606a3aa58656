"""What the keys of a cache get of attention: a second look at them, once each query's weights are known in sum.

A program owns a tile of keys, so that their sums are made in the same order every time.
"""

from __future__ import annotations

import torch

from slim.codegen.regions.schedule import Attention
from slim.codegen.regions.views import Buffer, View
from slim.codegen.triton.attention_cache import page, stored
from slim.codegen.triton.attention_parts import (
    Softmax,
    address,
    geometry,
    held,
    inside,
    key_mask,
    padded,
    terms,
)
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.rotation import Turn
from slim.codegen.triton.writer import Target, Writer, indented

_CONFIGS: tuple[Config, ...] = tuple(
    dict(BLOCK_T=keys, BLOCK_R=rows, SPLITS=many, num_warps=warps, num_stages=2)
    for keys, rows, many, warps in ((64, 16, 64, 4), (32, 16, 128, 4), (64, 32, 64, 4), (64, 64, 64, 8))
)


def level_of(region: Attention) -> View | None:
    """Memory for ``level`` [B, H, S]: log 2 of what the exponentials of each query's scores add up to."""
    return None if region.mass is None else Buffer("temp", "level", torch.float32, region.q.shape[:3]).view()


def level(top: str, total: str) -> str:
    """It, of a running softmax: a query that saw no key weighs none."""
    return f'tl.where({top} == float("-inf"), 0.0, {top}) + tl.log2(tl.where({total} == 0.0, 1.0, {total}))'


def weigh(region: Attention, target: Target, levels: View) -> Kernel:
    """The kernel that adds to ``region.mass``, after those that attend."""
    writer, g = Writer(region, target), geometry(region)
    assert region.mass is not None
    queries, batch = writer.size(region.q.shape[2]), writer.size(region.q.shape[0])
    k, _ = stored(writer, region, g.dtype, {})
    counted = f"tl.maximum({queries} - {region.votes}, 0)" if region.votes else "0"
    # votes begin anew where enough are cast
    old = f"(t < start) & ({queries} < {region.votes})" if region.votes else "t < start"
    mass = address(writer, region.mass, "mass", ["b", "g"])
    at = " + ".join([mass, *terms(writer, region.mass.strides[2:], ["t"])])
    begin = f"tl.maximum({counted}, first - start)" if region.causal else counted
    tile = [
        "first = tile * BLOCK_T", "t = first + tl.arange(0, BLOCK_T)", "there = t < keys",
        *page(writer, region, "t", "there"), *k.load("there"), *key_mask(writer, region, "there"),
        "got = tl.zeros((BLOCK_T,), tl.float32)",
        f"for m in range({begin} * {g.share}, {queries} * {g.share}, BLOCK_R):",
        *indented(_rows(writer, region, queries, levels)),
        f"got += tl.load({at}, mask=there & ({old}), other=0.0)", f"tl.store({at}, got, mask=there)",
    ]  # fmt: skip
    body = [
        "pair = tl.program_id(1)", f"g = pair % {g.kv_heads}", f"b = (pair // {g.kv_heads}).to(tl.int64)",
        f"start = tl.cast({held(writer, region)}, tl.int32)", f"keys = start + {queries}", *g.channels(),
        *k.begin("BLOCK_T"), "for tile in range(tl.program_id(0), tl.cdiv(keys, BLOCK_T), tl.num_programs(0)):",
        *indented(tile),
    ]  # fmt: skip
    return writer.kernel("weigh_keys", body, _CONFIGS, ["SPLITS", f"{batch} * {g.kv_heads}"])


def _rows(writer: Writer, region: Attention, queries: str, levels: View) -> list[str]:
    """``got``, with the weights of BLOCK_R rows: the heads of one query after the other."""
    g = geometry(region)
    softmax = Softmax(writer, region, "index[:, None]")
    turn = Turn(writer, region.rope, inside("d", g.width), padded(g.width))
    query, rows = "i.to(tl.int64)", "row_in[:, None]"
    seen = ["there[None, :]"]
    if region.causal:
        seen.append("(t[None, :] <= index[:, None])")
    if region.window is not None:
        seen.append(f"(index[:, None] - t[None, :] < {region.window})")
    if region.key_mask is not None:
        seen.append("counts[None, :]")
    known = address(writer, levels, "level", ["b", "head", query])
    return [
        "r = m + tl.arange(0, BLOCK_R)", f"i = r // {g.share}", f"row_in = i < {queries}", "index = start + i",
        f"head = g * {g.share} + r % {g.share}", *turn.begin(), *turn.angles(f"{query}[:, None]", rows),
        *turn.load("q_new", region.q, "q", ["b", "head[:, None]", f"{query}[:, None]"], rows),
        *softmax.begin("head", "[:, None]", "row_in"), f"s = tl.dot(q_new, tl.trans(key){g.precision})",
        *([] if region.k_scale is None else ["s = s * k_scales[None, :]"]), *softmax.scores(seen),
        f'p = {softmax.weights(f"tl.load({known}, mask=row_in, other=0.0)")}',
        "got += tl.sum(tl.where(row_in[:, None], p, 0.0), 0)",
    ]  # fmt: skip
