"""Kernels that are loops of slim's own: pointwise work, norms, reductions, running sums, the largest of a row."""

from __future__ import annotations

import math
from collections.abc import Callable

from slim.codegen.cpp.text import COMPUTED, STORED, Loop, ScalarText, number
from slim.codegen.cpp.writer import PIECE, Writer, assign, decompose, indented, loop_over, writes
from slim.codegen.regions.scalars import Load
from slim.codegen.regions.schedule import Norm, Pointwise, Reduce, Scan, TopK
from slim.codegen.regions.views import View


@writes(Pointwise)
def _pointwise(writer: Writer, region: Pointwise) -> list[str]:
    rows = writer.rows(region.out.shape, [region.body], [region.out])
    text = writer.scalars(rows.loop)
    value = text.write(region.body)
    store = assign(writer, text, region.out, value)
    if rows.outer:
        return rows.share([*text.outer, *loop_over(rows.width, [*text.inner, *store])])
    loop = loop_over("end", [*text.inner, *store], "begin")
    return [f"t.share({rows.width}, {PIECE}, [&](i64 begin, i64 end) {{", *indented([*text.outer, *loop]), "});"]


# -- rows --------------------------------------------------------------------------------------------------------------


@writes(Norm)
def _norm(writer: Writer, region: Norm) -> list[str]:
    assert region.body is not None
    assert region.out is not None
    gains = [view.expand(region.shape) for view in (region.gain, region.bias) if view is not None]
    rows = writer.rows(region.shape, [region.x, region.body, *(Load(view) for view in gains)], [region.out])
    text = writer.scalars(rows.loop, {id(region): "lane"})
    x = text.write(region.x)
    load = list(text.inner)
    passes = STATISTICS[region.kind](load, x, rows.width, number(region.eps))
    text.fresh()
    x = text.write(region.x)
    lane = [*text.inner, f"const float lane = {normalised(writer, text, region, x)};"]
    known = len(text.inner)
    value = text.write(region.body)
    final = [*lane, *text.inner[known:], *assign(writer, text, region.out, value)]
    return rows.share([*text.outer, *passes, *loop_over(rows.width, final)])


def normalised(writer: Writer, text: ScalarText, region: Norm, x: str) -> str:
    """x in the units of its row, with the gain and bias."""
    if region.kind == "softmax":
        return f"exp_f({x} - most) * inverse"
    result = f"({x} - mean) * inverse" if region.kind == "layer" else f"{x} * inverse"
    for view, form in ((region.gain, "{0} * {1}"), (region.bias, "{0} + {1}")):
        if view is not None:
            inner = text.loop.address((0,) * (len(region.shape) - 1) + (view.strides[-1],), writer.sizes, True)
            place = text.base(View(view.buffer, region.shape, (0,) * len(region.shape), view.offset))
            operand = f"(float){place}[{' + '.join(inner) or '0'}]"
            if view is region.gain and region.offset:
                operand = f"({operand} + {number(region.offset)})"
            result = form.format(f"({result})", operand)
    return result


def _sum(load: list[str], term: str, bound: str, name: str = "total") -> list[str]:
    loop = loop_over(bound, [*load, f"{name} += {term};"], pragma=f"omp simd reduction(+ : {name})")
    return [f"float {name} = 0;", *loop]


def _rms(load: list[str], x: str, width: str, eps: str) -> list[str]:
    return [*_sum(load, f"{x} * {x}", width), f"const float inverse = 1.0f / std::sqrt(total / {width} + {eps});"]


def _layer(load: list[str], x: str, width: str, eps: str) -> list[str]:
    distance = [*load, f"const float d = {x} - mean;"]
    return [
        *_sum(load, x, width), f"const float mean = total / {width};", *_sum(distance, "d * d", width, "squares"),
        f"const float inverse = 1.0f / std::sqrt(squares / {width} + {eps});",
    ]  # fmt: skip


def _softmax(load: list[str], x: str, width: str, eps: str) -> list[str]:
    most = loop_over(width, [*load, f"most = {x} > most ? {x} : most;"], pragma="omp simd reduction(max : most)")
    return ["float most = -INFINITY;", *most, *_sum(load, f"exp_f({x} - most)", width),
            "const float inverse = 1.0f / total;"]  # fmt: skip


STATISTICS: dict[str, Callable[..., list[str]]] = {"rms": _rms, "layer": _layer, "softmax": _softmax}

# kind -> (start, step); {0} is the running value, {1} the element
_REDUCTIONS = {
    "sum": ("0", "{0} + {1}", "+"), "prod": ("1", "{0} * {1}", "*"),
    "max": ("{lowest}", "{1} > {0} ? {1} : {0}", "max"), "min": ("{highest}", "{1} < {0} ? {1} : {0}", "min"),
    "any": ("false", "{0} | {1}", "||"), "all": ("true", "{0} & {1}", "&&"),
}  # fmt: skip
_LIMITS = {"float": ("-INFINITY", "INFINITY"), "i64": ("INT64_MIN", "INT64_MAX"), "bool": ("false", "true")}


@writes(Reduce)
def _reduce(writer: Writer, region: Reduce) -> list[str]:
    assert region.body is not None
    assert region.out is not None
    kept, away = region.shape[: -region.depth], region.shape[-region.depth :]
    names = [f"o{d}" for d in range(len(kept))] + [f"q{d}" for d in range(region.depth - 1)] + ["i"]
    loop = Loop([[d] for d in range(len(region.shape))], names)
    text = writer.scalars(loop)
    x = text.write(region.x)
    kind = COMPUTED[region.x.dtype]
    pragma, step = (_search if region.kind.startswith("arg") else _fold)(text, x, region.kind)
    lines = [*text.outer, *loop_over(writer.sizes.text(away[-1]), step, pragma=pragma)]
    for d in reversed(range(region.depth - 1)):
        bound = writer.sizes.text(away[d])
        lines = [f"for (i64 q{d} = 0; q{d} < {bound}; q{d}++) {{", *indented(lines), "}"]
    single = Loop([[d] for d in range(len(kept))] + [[]], [*names[: len(kept)], "i"])
    result = ScalarText(writer.sizes, writer.arguments, single, {id(region): "lane"}, tag="r")
    value = result.write(region.body)
    out = View(region.out.buffer, region.out.shape, region.out.strides, region.out.offset)
    place = result.base(out)
    store = [*result.outer, *result.inner, f"{place}[0] = ({STORED[out.buffer.dtype]}){value};"]
    final = f"const {'i64' if region.kind.startswith('arg') else kind} lane = {_final(region.kind)};"
    body = [*_start(kind, region.kind), *lines, final, *store]
    count = writer.sizes.text(math.prod(kept))
    piece = f"size_max(1, {PIECE} / size_max(1, {writer.sizes.text(math.prod(away))}))"
    index = decompose(writer.sizes, kept, "r", "o")
    inner = ["for (i64 r = begin; r < end; r++) {", *indented([*index, *body]), "}"]
    return [f"t.share({count}, {piece}, [&](i64 begin, i64 end) {{", *indented(inner), "});"]


def _start(kind: str, name: str) -> list[str]:
    lowest, highest = _LIMITS[kind]
    if name.startswith("arg"):
        return [f"{kind} best = {lowest if name == 'argmax' else highest};", "i64 where = 0;"]
    start = _REDUCTIONS[name][0].format(lowest=lowest, highest=highest)
    return [f"{kind} total = {start};"]


def _final(name: str) -> str:
    return "where" if name.startswith("arg") else "total"


def _fold(text: ScalarText, x: str, name: str) -> tuple[str, list[str]]:
    _, step, symbol = _REDUCTIONS[name]
    return f"omp simd reduction({symbol} : total)", [*text.inner, f"total = {step.format('total', x)};"]


def _search(text: ScalarText, x: str, name: str) -> tuple[str, list[str]]:
    better = ">" if name == "argmax" else "<"
    return "GCC unroll 1", [*text.inner, f"if ({x} {better} best) best = {x}, where = i;"]


@writes(Scan)
def _scan(writer: Writer, region: Scan) -> list[str]:
    rows = writer.rows(region.out.shape, [region.x], [region.out])
    text = writer.scalars(rows.loop)
    x = text.write(region.x)
    kind = COMPUTED[region.x.dtype]
    step = [*text.inner, f"total += {x};", *assign(writer, text, region.out, "total")]
    return rows.share([*text.outer, f"{kind} total = 0;", *loop_over(rows.width, step, pragma="GCC unroll 1")])


@writes(TopK)
def _topk(writer: Writer, region: TopK) -> list[str]:
    rows = writer.rows(region.x.shape, [Load(region.x)], [])
    outs = [view.permute(range(len(view.shape))) for view in (region.values, region.indices)]
    lead = rows.shape[:-1]
    loop = Loop([[d] for d in range(len(lead))] + [[len(lead)]], [*(f"o{d}" for d in range(len(lead))), "i"])
    text = writer.scalars(loop)
    x, values, indices = (text.base(view) for view in (region.x, *outs))
    stride = writer.sizes.text(region.x.strides[-1])
    k = writer.sizes.text(region.values.shape[-1])
    body = [
        *decompose(writer.sizes, lead, "r", "o"), *text.outer,
        f"top_k({x}, {writer.sizes.text(region.x.shape[-1])}, {stride}, {k}, {values}, {indices});",
    ]  # fmt: skip
    count = writer.sizes.text(math.prod(lead))
    inner = ["for (i64 r = begin; r < end; r++) {", *indented(body), "}"]
    return [f"t.share({count}, 1, [&](i64 begin, i64 end) {{", *indented(inner), "});"]
