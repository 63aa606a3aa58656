"""Rows that choose their matrices: sorted by expert, then tiles of rows of one expert each."""

from __future__ import annotations

import torch

from slim.codegen.regions.views import Buffer
from slim.codegen.triton.kernel import Config, Kernel
from slim.codegen.triton.sweep import Sweep, choose
from slim.codegen.triton.tiles import Tile, many_configurations
from slim.codegen.triton.weights import moved
from slim.codegen.triton.writer import Target, Writer, indented, power_of_two


def experts(sweep: Sweep, target: Target, temps: list[Buffer]) -> list[Kernel]:
    """The kernel that sorts the rows, and the one that multiplies them."""
    count = int(sweep.matrix.data.shape[0])
    name = sweep.region.node.name
    order = Buffer("temp", f"{name}_order", torch.int32, (sweep.rows,))
    starts = Buffer("temp", f"{name}_starts", torch.int32, (count + 1,))
    temps += [order, starts]
    return [_sorted(sweep, target, order, starts, count), _tiles(sweep, target, order, starts, count)]


def _sorted(sweep: Sweep, target: Target, order: Buffer, starts: Buffer, count: int) -> Kernel:
    """A program an expert: how many rows lie before its own, then which are its own, in rising order."""
    writer = Writer(sweep.region, target)
    view = sweep.source.expert
    assert view is not None
    ids, rows = writer.pointer(view.buffer, "expert_of"), writer.size(sweep.rows)
    offset = "" if view.offset == 0 else f" + {writer.size(view.offset)}"
    load = f"tl.load({ids}{offset} + row * {writer.size(view.strides[-1])}, mask=row < {rows}, other={count})"
    out, begin = writer.pointer(order, "order"), writer.pointer(starts, "starts")
    read = ["row = first + tl.arange(0, BLOCK)", f"chosen = {load}"]
    lines = [
        "expert = tl.program_id(0)", "before = tl.zeros((BLOCK,), tl.int32)",
        f"for first in range(0, {rows}, BLOCK):", *indented([*read, "before += (chosen < expert).to(tl.int32)"]),
        "place = tl.sum(before, 0)", f"tl.store({begin} + expert, place)",
        f"for first in range(0, {rows}, BLOCK):",
        *indented([
            *read, "own = (chosen == expert).to(tl.int32)",
            f"tl.store({out} + place + tl.cumsum(own, 0) - 1, row, mask=own != 0)", "place += tl.sum(own, 0)",
        ]),
        f"if expert == {count - 1}:", f"    tl.store({begin} + {count}, place)",
    ]  # fmt: skip
    configs: list[Config] = [dict(BLOCK=1024, num_warps=4), dict(BLOCK=4096, num_warps=8)]
    return writer.kernel("experts_sort", lines, configs, [str(count)])


def _tiles(sweep: Sweep, target: Target, order: Buffer, starts: Buffer, count: int) -> Kernel:
    writer = Writer(sweep.region, target)
    configs = [{k: v for k, v in config.items() if k != "GROUP_M"} for config in many_configurations(sweep)]
    configs = [configs[i] for i in _SMALL_FIRST if i < len(configs)]
    tile = Tile(writer, sweep, configs)
    begin, held = writer.pointer(starts, "starts"), writer.pointer(order, "order")
    lines = [
        "block = tl.program_id(0)",
        f"each = tl.arange(0, {power_of_two(count)})",
        f"starts_of = tl.load({begin} + each, mask=each < {count}, other=0)",
        f"ends_of = tl.load({begin} + each + 1, mask=each < {count}, other=0)",
        "tiles = (ends_of - starts_of + BLOCK_M - 1) // BLOCK_M",
        "until = tl.cumsum(tiles, 0)",
        "if tl.program_id(1) >= tl.sum(tiles, 0):",
        "    return",
        "expert = tl.sum((until <= tl.program_id(1)).to(tl.int32), 0)",
        "own = each == expert",
        "tile = tl.program_id(1) - tl.sum(tl.where(own, until - tiles, 0), 0)",
        "last = tl.sum(tl.where(own, ends_of, 0), 0)",
        "position = (tl.sum(tl.where(own, starts_of, 0), 0) + tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]",
        "present = position < last",
        f"row = tl.load({held} + tl.minimum(position, last - 1)).to(tl.int64)",
        "expert = expert.to(tl.int64)",
        *choose(writer, sweep), *moved(sweep.branches[0].matrices), *tile.before(), *tile.loop(f"0, {sweep.n}"),
        *tile.finished(), *tile.results.store(),
    ]  # fmt: skip
    grid = [sweep.blocks, f"triton.cdiv({writer.size(sweep.rows)}, BLOCK_M) + {count}"]
    return writer.kernel("experts_tiles", lines, configs, grid)


_SMALL_FIRST = (3, 0, 5, 2, 4, 1)  # an expert has few of the rows
