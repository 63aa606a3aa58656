"""Kernels written from their region's expression alone: pointwise work, norms, reductions, running sums, top k."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from slim.codegen.regions.scalars import F32, I64, Gather, Iota, Load, Scalar, walk
from slim.codegen.regions.schedule import Norm, Pointwise, Reduce, Scan, TopK
from slim.codegen.regions.views import Size, View, coalesce
from slim.codegen.triton.kernel import Config, Form, Kernel, Stage
from slim.codegen.triton.text import Axis, Index, ScalarText, Text, number
from slim.codegen.triton.writer import Target, Writer, indented, power_of_two, writes

_SHORT = 32  # columns up to which rows are not worth a program each


def _one(kernel: Kernel) -> Stage:
    return Stage([Form([kernel])])


def decompose(writer: Writer, shape: Sequence[Size], index: str, prefix: str) -> list[str]:
    """Statements that split ``index`` into ``prefix0``, ``prefix1``, ... for the dimensions of ``shape``."""
    lines, rest = [], index
    for d in range(len(shape) - 1, 0, -1):
        size = writer.size(shape[d])
        lines.append(f"{prefix}{d} = {rest} % {size}")
        rest = f"({rest} // {size})"
    return [*lines, f"{prefix}0 = {rest}"] if shape else []


def walked(shape: Sequence[Size], bodies: Sequence[Scalar], outs: Sequence[View]) -> list[list[int]]:
    """Groups of neighbouring dimensions that all of ``bodies`` and ``outs`` walk as one."""
    maps = [out.strides for out in outs]
    for body in bodies:
        for scalar in walk(body):
            if isinstance(scalar, (Load, Gather)):
                maps.append(scalar.view.strides)
            elif isinstance(scalar, Iota):
                maps.append(scalar.map.strides)
    return coalesce(shape, maps, keep_last=len(shape) > 0 and not maps)


# -- pointwise ---------------------------------------------------------------------------------------------------------

_FLAT: tuple[Config, ...] = tuple(
    dict(BLOCK=block, num_warps=warps) for block, warps in ((512, 4), (1024, 4), (1024, 8), (2048, 8), (256, 2))
)


@writes(Pointwise)
def _pointwise(region: Pointwise, target: Target) -> Stage:
    """Blocks of a row where rows are long, and of all elements otherwise."""
    writer = Writer(region, target)
    shape = region.out.shape
    groups = walked(shape, [region.body], [region.out]) or [[]]
    counts = [math.prod(shape[d] for d in group) for group in groups]
    names = [f"i{g}" for g in range(len(groups))]
    by_rows = len(groups) > 1 and not (isinstance(counts[-1], int) and counts[-1] <= _SHORT)
    if by_rows:
        width = writer.size(counts[-1])
        lines = [
            "row = tl.program_id(0).to(tl.int64)", *decompose(writer, counts[:-1], "row", "i"),
            f"{names[-1]} = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)", f"inside = {names[-1]} < {width}",
        ]  # fmt: skip
        axes = [*(Axis(name) for name in names[:-1]), Axis(names[-1], "inside")]
        grid = [writer.size(math.prod(counts[:-1])), f"triton.cdiv({width}, BLOCK)"]
    else:
        total = writer.size(math.prod(counts))
        lines = [
            "i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)", f"inside = i < {total}",
            *decompose(writer, counts, "i", "i"),
        ]  # fmt: skip
        axes = [Axis(name, "inside") for name in names]
        grid = [f"triton.cdiv({total}, BLOCK)"]
    text = ScalarText(writer, Index(axes, groups))
    value = text.write(region.body)
    store = text.store(region.out, value.text)
    return _one(writer.kernel("pointwise", [*lines, *text.lines, store], _FLAT, grid))


# -- rows --------------------------------------------------------------------------------------------------------------


class Rows:
    """A program for each row of a shape: ``row`` is its number, ``i`` a block of columns."""

    def __init__(self, writer: Writer, shape: Sequence[Size], groups: list[list[int]], depth: int = 1) -> None:
        self.writer = writer
        outer = groups[: len(groups) - depth] if depth else groups
        counts = [math.prod(shape[d] for d in group) for group in outer]
        inner = groups[len(groups) - depth :]
        self.inner = [math.prod(shape[d] for d in group) for group in inner]
        self.width = math.prod(self.inner)
        self.begin = ["row = tl.program_id(0).to(tl.int64)", *decompose(writer, counts, "row", "o")]
        names = [f"o{g}" for g in range(len(outer))]
        columns = ["i"] if len(inner) == 1 else [f"i{g}" for g in range(len(inner))]
        self.index = Index([*map(Axis, names), *(Axis(name, "inside") for name in columns)], groups)
        self.grid = [writer.size(math.prod(counts))]

    def loop(self, body: Sequence[str]) -> list[str]:
        """``body`` for each block of columns."""
        bound = self.writer.size(self.width)
        split = decompose(self.writer, self.inner, "i", "i") if len(self.inner) > 1 else []
        inner = ["i = first + tl.arange(0, BLOCK)", f"inside = i < {bound}", *split, *body]
        return [f"for first in range(0, {bound}, BLOCK):", *indented(inner)]

    @property
    def configs(self) -> tuple[Config, ...]:
        """A block that holds the whole row, where it is not too long."""
        width = self.width if isinstance(self.width, int) else 4096
        block = min(max(power_of_two(width), 16), 4096)
        warps = max(1, min(8, block // 256))
        best: Config = dict(BLOCK=block, num_warps=warps)
        return (best, dict(BLOCK=block, num_warps=min(16, 2 * warps)), dict(BLOCK=max(16, block // 4), num_warps=warps))


@writes(Norm)
def _norm(region: Norm, target: Target) -> Stage:
    """Statistics of the row in one or two passes, then what is stored; a short row stays in the cache between."""
    assert region.body is not None
    assert region.out is not None
    writer = Writer(region, target)
    rows = rows_over(writer, region.shape, [region.x, region.body], [region.out], region)
    text = ScalarText(writer, rows.index, {})
    over = over_rows(rows, text, region.x)
    lines = [*rows.begin, *STATISTICS[region.kind](over, writer.size(rows.width), number(region.eps))]
    text.fresh()
    x = text.write(region.x).text
    text.lines.append(f"lane = {normalised(text, region, x)}")
    text.lanes[id(region)] = Text("lane", frozenset(rows.index.axes))  # type: ignore[arg-type]
    value = text.write(region.body)
    store = text.store(region.out, value.text)
    return _one(writer.kernel(region.kind, [*lines, *rows.loop([*text.lines, store])], rows.configs, rows.grid))


def rows_over(
    writer: Writer, shape: Sequence[Size], bodies: Sequence[Scalar], outs: Sequence[View], norm: Norm | None = None
) -> Rows:
    """The rows of ``shape`` at which bodies, the operands of a norm and results are read and written."""
    maps = [out.strides for out in outs]
    operands = (norm.gain, norm.bias) if norm is not None else ()
    for body in [*bodies, *(Load(view.expand(shape)) for view in operands if view is not None)]:
        maps += [s.view.strides for s in walk(body) if isinstance(s, (Load, Gather))]
        maps += [s.map.strides for s in walk(body) if isinstance(s, Iota)]
    return Rows(writer, shape, coalesce(shape, maps, keep_last=True))


def over_rows(rows: Rows, text: ScalarText, x: Scalar) -> Over:
    """What makes a pass over rows of what is done to a block of ``x``."""

    def over(step: Callable[[str], list[str]]) -> list[str]:
        text.fresh()
        held = text.write(x).text
        return rows.loop([*text.lines, *step(held)])

    return over


def normalised(text: ScalarText, region: Norm, x: str) -> str:
    """``x`` in the units of its row, with the gain and bias that ``text`` loads."""
    if region.kind == "softmax":
        return f"tl.exp({x} - most) * inverse"
    result = f"({x} - mean) * inverse" if region.kind == "layer" else f"{x} * inverse"
    if region.gain is not None:
        gain = text.write(Load(region.gain.expand(region.shape))).text
        result = f"{result} * ({gain} + {number(region.offset)})" if region.offset else f"{result} * {gain}"
    if region.bias is not None:
        result = f"{result} + {text.write(Load(region.bias.expand(region.shape))).text}"
    return result


Over = Callable[[Callable[[str], list[str]]], list[str]]


def _total(over: Over, term: str, name: str) -> list[str]:
    step = over(lambda x: [f"{name}s += tl.where(inside, {term.format(x)}, 0.0)"])
    return [f"{name}s = tl.zeros((BLOCK,), tl.float32)", *step, f"{name} = tl.sum({name}s, 0)"]


def _rms(over: Over, width: str, eps: str) -> list[str]:
    return [*_total(over, "{0} * {0}", "square"), f"inverse = 1.0 / tl.sqrt_rn(square / {width} + {eps})"]


def _layer(over: Over, width: str, eps: str) -> list[str]:
    return [
        *_total(over, "{0}", "total"), f"mean = total / {width}",
        *_total(over, "({0} - mean) * ({0} - mean)", "square"), f"inverse = 1.0 / tl.sqrt_rn(square / {width} + {eps})",
    ]  # fmt: skip


def _softmax(over: Over, width: str, eps: str) -> list[str]:
    most = over(lambda x: [f'mosts = tl.maximum(mosts, tl.where(inside, {x}, float("-inf")))'])
    return [
        'mosts = tl.full((BLOCK,), float("-inf"), tl.float32)', *most, "most = tl.max(mosts, 0)",
        *_total(over, "tl.exp({0} - most)", "total"), "inverse = 1.0 / total",
    ]  # fmt: skip


STATISTICS: dict[str, Callable[[Over, str, str], list[str]]] = {"rms": _rms, "layer": _layer, "softmax": _softmax}

# kind -> (start, step, what is left of a block); {0} is the running block, {1} the element
_REDUCTIONS = {
    "sum": ("0", "{0} + {1}", "tl.sum({0}, 0)"), "prod": ("1", "{0} * {1}", "tl.reduce({0}, 0, product)"),
    "max": ("{lowest}", "tl.maximum({0}, {1})", "tl.max({0}, 0)"),
    "min": ("{highest}", "tl.minimum({0}, {1})", "tl.min({0}, 0)"),
    "any": ("0", "tl.maximum({0}, {1})", "tl.max({0}, 0)"), "all": ("1", "tl.minimum({0}, {1})", "tl.min({0}, 0)"),
}  # fmt: skip
_LIMITS = {
    "tl.float32": ('float("-inf")', 'float("inf")'), "tl.int64": (str(-(2**63)), str(2**63 - 1)),
    "tl.int32": ("0", "1"),
}  # fmt: skip


@writes(Reduce)
def _reduce(region: Reduce, target: Target) -> Stage:
    assert region.body is not None
    assert region.out is not None
    writer = Writer(region, target)
    rows = Rows(writer, region.shape, [[d] for d in range(len(region.shape))], region.depth)
    text = ScalarText(writer, rows.index)
    x = text.write(region.x)
    kind = {F32: "tl.float32", I64: "tl.int64"}.get(region.x.dtype, "tl.int32")
    fold = _search if region.kind.startswith("arg") else _fold
    start, step, end = fold(writer, region.kind, kind, x.text)
    lines = [*rows.begin, *start, *rows.loop([*text.lines, *step]), *end]
    kept = len(region.shape) - region.depth
    single = Index([*rows.index.axes[:kept], None], [[d] for d in range(kept)] + [[]])
    result = ScalarText(writer, single, {id(region): Text("lane")}, tag="r")
    value = result.write(region.body)
    out = View(region.out.buffer, region.out.shape, region.out.strides, region.out.offset)
    store = result.store(out, value.text)
    return _one(writer.kernel(region.kind, [*lines, *result.lines, store], rows.configs, rows.grid))


def _fold(writer: Writer, name: str, kind: str, x: str) -> tuple[list[str], list[str], list[str]]:
    lowest, highest = _LIMITS[kind]
    start, step, end = _REDUCTIONS[name]
    start = start.format(lowest=lowest, highest=highest)
    if name == "prod":
        writer.function("product")
    element = f"tl.where(inside, {x}{'.to(tl.int32)' if kind == 'tl.int32' else ''}, {start})"
    final = end.format("totals")
    return (
        [f"totals = tl.full((BLOCK,), {start}, {kind})"],
        [f"totals = {step.format('totals', element)}"],
        [f"lane = {final} != 0" if kind == "tl.int32" else f"lane = {final}"],
    )


def _search(writer: Writer, name: str, kind: str, x: str) -> tuple[list[str], list[str], list[str]]:
    """The first index of the largest or smallest: a block's own, and a later block's only if it is better."""
    word, better = ("max", ">") if name == "argmax" else ("min", "<")
    worst = _LIMITS[kind][word == "min"]
    step = [
        f"held = tl.where(inside, {x}, {worst})",
        f"found = tl.{word}(held, 0)",
        f"place = tl.min(tl.where(inside & (held == found), i, {2**31 - 1}), 0).to(tl.int64)",
        f"lane = tl.where((lane < 0) | (found {better} best), place, lane)",
        f"best = tl.{word}imum(best, found)",
    ]
    return [f"best = tl.full((), {worst}, {kind})", "lane = tl.full((), -1, tl.int64)"], step, []


@writes(Scan)
def _scan(region: Scan, target: Target) -> Stage:
    writer = Writer(region, target)
    rows = rows_over(writer, region.out.shape, [region.x], [region.out])
    text = ScalarText(writer, rows.index)
    x = text.write(region.x)
    kind = "tl.float32" if region.x.dtype == F32 else "tl.int64"
    step = [
        *text.lines, f"held = tl.where(inside, {x.text}, 0).to({kind})",
        text.store(region.out, "total + tl.cumsum(held, 0)"), "total += tl.sum(held, 0)",
    ]  # fmt: skip
    lines = [*rows.begin, f"total = tl.full((), 0, {kind})", *rows.loop(step)]
    return _one(writer.kernel("scan", lines, rows.configs, rows.grid))


@writes(TopK)
def _topk(region: TopK, target: Target) -> Stage:
    """The largest of what is left, again and again: k is small."""
    writer = Writer(region, target)
    shape = region.x.shape
    outer = [Axis(f"o{d}") for d in range(len(shape) - 1)]
    text = ScalarText(writer, Index([*outer, Axis("i", "inside")]))
    x = text.write(Load(region.x))
    results = ScalarText(writer, Index([*outer, Axis("k")]), tag="r")
    width = writer.size(shape[-1])
    lowest = 'float("-inf")' if x.text and region.x.buffer.dtype.is_floating_point else str(-(2**63))
    k = writer.size(region.values.shape[-1])
    lines = [
        "row = tl.program_id(0).to(tl.int64)", *decompose(writer, shape[:-1], "row", "o"), "i = tl.arange(0, BLOCK)",
        f"inside = i < {width}", *text.lines, "left = inside", f"for k in range({k}):",
        *indented([
            f"most = tl.max(tl.where(left, {x.text}, {lowest}), 0)",
            f"place = tl.min(tl.where(left & ({x.text} == most), i, {width} - 1), 0)",
            results.store(region.values, "most"), results.store(region.indices, "place"),
            "left = left & (i != place)",
        ]),
    ]  # fmt: skip
    block = power_of_two(int(shape[-1]))
    configs = [dict(BLOCK=max(16, block), num_warps=max(1, min(8, block // 256)))]
    return _one(writer.kernel("top_k", lines, configs, [writer.size(math.prod(shape[:-1]))]))
