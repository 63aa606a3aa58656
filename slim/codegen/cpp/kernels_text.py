"""One C++ kernel for each region, as text over ``z`` (sizes), ``t`` (the thread) and ``p`` (buffers)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slim.codegen.cpp.text import COMPUTED, STORED, Arguments, Loop, ScalarText, Sizes, number
from slim.codegen.regions.scalars import F32, Gather, Iota, Load, Scalar, walk
from slim.codegen.regions.schedule import Attention, Linear, Matrix, Norm, Part, Pointwise, Reduce, Region, Scan, TopK
from slim.codegen.regions.views import Buffer, Size, View, coalesce, contiguous_strides, same

_PIECE = 4096  # elements that a thread takes at a time: some microseconds of work
NAME = "@"  # stands for the kernel's name, so that equal kernels have equal texts


@dataclass
class Kernel:
    """The text of a region's kernel, the buffers it takes in order, and the scratch its library call needs."""

    text: str
    buffers: list[Buffer | None]
    scratch: list[str]


class Writer:
    """Writes one kernel."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.arguments = Arguments()
        self.scratch: list[str] = []
        self.helpers: list[str] = []  # functions that the library calls back

    def kernel(self, region: Region) -> Kernel:
        """The kernel of any region but a foreign one."""
        body = _WRITERS[type(region)](self, region)
        head = f"static void {NAME}(const Sizes& z, Thread& t, char* const* p) {{"
        text = "\n".join([*self.helpers, head, *_indent(["(void)z;", *body]), "}"])
        return Kernel(text, self.arguments.buffers, self.scratch)

    # -- loops ---------------------------------------------------------------------------------------------------------

    def rows(self, shape: Sequence[Size], bodies: Sequence[Scalar], outs: Sequence[View]) -> _Rows:
        """How to walk ``shape`` row by row, all of ``bodies`` and ``outs`` with it."""
        maps = [out.strides for out in outs]
        for body in bodies:
            for scalar in walk(body):
                if isinstance(scalar, (Load, Gather)):
                    maps.append(scalar.view.strides)
                elif isinstance(scalar, Iota):
                    maps.append(scalar.map.strides)
        return _Rows(self.sizes, shape, coalesce(shape, maps, keep_last=True))

    def scalars(self, loop: Loop, lanes: dict[int, str] | None = None) -> ScalarText:
        return ScalarText(self.sizes, self.arguments, loop, lanes)


class _Rows:
    """A shape as rows of its last dimension: ``r`` is the row, ``i`` the column."""

    def __init__(self, sizes: Sizes, shape: Sequence[Size], groups: list[list[int]]) -> None:
        self.sizes = sizes
        self.shape = shape
        if not groups:  # a single number
            groups = [[]]
        self.outer, self.last = groups[:-1], groups[-1]
        names = [f"i{position}" for position in range(len(self.outer))] if len(self.outer) > 1 else ["r"]
        self.loop = Loop(groups, [*names[: len(self.outer)], "i"])
        self.width = sizes.text(math.prod(shape[d] for d in self.last))
        self.count = sizes.text(math.prod(shape[d] for group in self.outer for d in group))

    def index(self) -> list[str]:
        """Statements that find the outer indices of row ``r``."""
        if len(self.outer) < 2:
            return []
        lines, rest = [], "r"
        for position in range(len(self.outer) - 1, 0, -1):
            size = self.sizes.text(math.prod(self.shape[d] for d in self.outer[position]))
            lines.append(f"const i64 i{position} = {rest} % {size};")
            rest = f"({rest} / {size})"
        return [*lines, f"const i64 i0 = {rest};"]

    def share(self, body: list[str]) -> list[str]:
        """The rows, shared by the threads."""
        piece = f"size_max(1, {_PIECE} / size_max(1, {self.width}))"
        inner = ["for (i64 r = begin; r < end; r++) {", *_indent([*self.index(), *body]), "}"]
        return [f"t.share({self.count}, {piece}, [&](i64 begin, i64 end) {{", *_indent(inner), "});"]


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _for(bound: str, body: Sequence[str], begin: str = "0", pragma: str = "GCC ivdep") -> list[str]:
    return [f"#pragma {pragma}", f"for (i64 i = {begin}; i < {bound}; i++) {{", *_indent(body), "}"]


def _assign(writer: Writer, text: ScalarText, out: View, value: str) -> list[str]:
    """Statements of the inner loop that store ``value``; writes the base pointer into ``text.outer``."""
    place = text.base(out)
    inner = text.loop.address(out.strides, writer.sizes, True)
    return [f"{place}[{' + '.join(inner) or '0'}] = ({STORED[out.buffer.dtype]}){value};"]


# -- pointwise ---------------------------------------------------------------------------------------------------------


def _pointwise(writer: Writer, region: Pointwise) -> list[str]:
    rows = writer.rows(region.out.shape, [region.body], [region.out])
    text = writer.scalars(rows.loop)
    value = text.write(region.body)
    store = _assign(writer, text, region.out, value)
    if rows.outer:
        return rows.share([*text.outer, *_for(rows.width, [*text.inner, *store])])
    loop = _for("end", [*text.inner, *store], "begin")
    return [f"t.share({rows.width}, {_PIECE}, [&](i64 begin, i64 end) {{", *_indent([*text.outer, *loop]), "});"]


# -- rows --------------------------------------------------------------------------------------------------------------


def _norm(writer: Writer, region: Norm) -> list[str]:
    assert region.body is not None and region.out is not None
    gains = [view.expand(region.shape) for view in (region.gain, region.bias) if view is not None]
    rows = writer.rows(region.shape, [region.x, region.body, *(Load(view) for view in gains)], [region.out])
    text = writer.scalars(rows.loop, {id(region): "lane"})
    x = text.write(region.x)
    load = list(text.inner)
    passes = _STATISTICS[region.kind](load, x, rows.width, number(region.eps))
    text.fresh()
    x = text.write(region.x)
    lane = [*text.inner, f"const float lane = {_normalised(writer, text, region, x)};"]
    known = len(text.inner)
    value = text.write(region.body)
    final = [*lane, *text.inner[known:], *_assign(writer, text, region.out, value)]
    return rows.share([*text.outer, *passes, *_for(rows.width, final)])


def _normalised(writer: Writer, text: ScalarText, region: Norm, x: str) -> str:
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
    loop = _for(bound, [*load, f"{name} += {term};"], pragma=f"omp simd reduction(+ : {name})")
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
    most = _for(width, [*load, f"most = {x} > most ? {x} : most;"], pragma="omp simd reduction(max : most)")
    return ["float most = -INFINITY;", *most, *_sum(load, f"exp_f({x} - most)", width),
            "const float inverse = 1.0f / total;"]  # fmt: skip


_STATISTICS: dict[str, Callable[..., list[str]]] = {"rms": _rms, "layer": _layer, "softmax": _softmax}

# kind -> (start, step); {0} is the running value, {1} the element
_REDUCTIONS = {
    "sum": ("0", "{0} + {1}", "+"), "prod": ("1", "{0} * {1}", "*"),
    "max": ("{lowest}", "{1} > {0} ? {1} : {0}", "max"), "min": ("{highest}", "{1} < {0} ? {1} : {0}", "min"),
    "any": ("false", "{0} | {1}", "||"), "all": ("true", "{0} & {1}", "&&"),
}  # fmt: skip
_LIMITS = {"float": ("-INFINITY", "INFINITY"), "i64": ("INT64_MIN", "INT64_MAX"), "bool": ("false", "true")}


def _reduce(writer: Writer, region: Reduce) -> list[str]:
    assert region.body is not None and region.out is not None
    kept, away = region.shape[: -region.depth], region.shape[-region.depth :]
    names = [f"o{d}" for d in range(len(kept))] + [f"q{d}" for d in range(region.depth - 1)] + ["i"]
    loop = Loop([[d] for d in range(len(region.shape))], names)
    text = writer.scalars(loop)
    x = text.write(region.x)
    kind = COMPUTED[region.x.dtype]
    lines = _search(text, x, kind, region.kind) if region.kind.startswith("arg") else _fold(text, x, kind, region.kind)
    lines = [*text.outer, *_for(writer.sizes.text(away[-1]), lines[1], pragma=lines[0])]
    for d in reversed(range(region.depth - 1)):
        bound = writer.sizes.text(away[d])
        lines = [f"for (i64 q{d} = 0; q{d} < {bound}; q{d}++) {{", *_indent(lines), "}"]
    result = writer.scalars(Loop([[d] for d in range(len(kept))] + [[]], [*names[: len(kept)], "i"]))
    result.lanes[id(region)] = "lane"
    value = result.write(region.body)
    out = View(region.out.buffer, region.out.shape, region.out.strides, region.out.offset)
    place = result.base(out)
    store = [*result.outer, *result.inner, f"{place}[0] = ({STORED[out.buffer.dtype]}){value};"]
    final = f"const {'i64' if region.kind.startswith('arg') else kind} lane = {_final(region.kind)};"
    body = [*_start(kind, region.kind), *lines, final, *store]
    count = writer.sizes.text(math.prod(kept))
    piece = f"size_max(1, {_PIECE} / size_max(1, {writer.sizes.text(math.prod(away))}))"
    index = _decompose(writer.sizes, kept, "r", "o")
    inner = ["for (i64 r = begin; r < end; r++) {", *_indent([*index, *body]), "}"]
    return [f"t.share({count}, {piece}, [&](i64 begin, i64 end) {{", *_indent(inner), "});"]


def _start(kind: str, name: str) -> list[str]:
    lowest, highest = _LIMITS[kind]
    if name.startswith("arg"):
        return [f"{kind} best = {lowest if name == 'argmax' else highest};", "i64 where = 0;"]
    start = _REDUCTIONS[name][0].format(lowest=lowest, highest=highest)
    return [f"{kind} total = {start};"]


def _final(name: str) -> str:
    return "where" if name.startswith("arg") else "total"


def _fold(text: ScalarText, x: str, kind: str, name: str) -> tuple[str, list[str]]:
    _, step, symbol = _REDUCTIONS[name]
    return f"omp simd reduction({symbol} : total)", [*text.inner, f"total = {step.format('total', x)};"]


def _search(text: ScalarText, x: str, kind: str, name: str) -> tuple[str, list[str]]:
    better = ">" if name == "argmax" else "<"
    return "GCC unroll 1", [*text.inner, f"if ({x} {better} best) best = {x}, where = i;"]


def _decompose(sizes: Sizes, shape: Sequence[Size], index: str, prefix: str) -> list[str]:
    """Statements that split ``index`` into one variable for each dimension of ``shape``."""
    lines, rest = [], index
    for d in range(len(shape) - 1, -1, -1):
        if d == 0:
            lines.append(f"const i64 {prefix}0 = {rest};")
        else:
            size = sizes.text(shape[d])
            lines.append(f"const i64 {prefix}{d} = {rest} % {size};")
            rest = f"({rest} / {size})"
    return [*lines, *(f"(void){prefix}{d};" for d in range(len(shape)))]


def _scan(writer: Writer, region: Scan) -> list[str]:
    rows = writer.rows(region.out.shape, [region.x], [region.out])
    text = writer.scalars(rows.loop)
    x = text.write(region.x)
    kind = COMPUTED[region.x.dtype]
    step = [*text.inner, f"total += {x};", *_assign(writer, text, region.out, "total")]
    return rows.share([*text.outer, f"{kind} total = 0;", *_for(rows.width, step, pragma="GCC unroll 1")])


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
        *_decompose(writer.sizes, lead, "r", "o"), *text.outer,
        f"top_k({x}, {writer.sizes.text(region.x.shape[-1])}, {stride}, {k}, {values}, {indices});",
    ]  # fmt: skip
    count = writer.sizes.text(math.prod(lead))
    inner = ["for (i64 r = begin; r < end; r++) {", *_indent(body), "}"]
    return [f"t.share({count}, 1, [&](i64 begin, i64 end) {{", *_indent(inner), "});"]


# -- linear ------------------------------------------------------------------------------------------------------------


def _linear(writer: Writer, region: Linear) -> list[str]:
    expert = region.source.expert
    fields = "const Sizes& z; char* const* p;" + (" const i64* order;" if expert is not None else "")
    row = ["const i64 r = e.order[row];"] if expert is not None else ["const i64 r = row;"]
    writer.helpers.append(f"struct {NAME}_env {{ {fields} }};")
    _load_row(writer, region, row)
    for index, part in enumerate(region.parts):
        _store_row(writer, part, index, row)
    matrices = [product.matrix for part in region.parts for product in part.products]
    rows = writer.sizes.text(math.prod(region.source.view.shape[:-1]))
    n = writer.sizes.text(region.source.view.shape[-1])
    quantized = any(matrix.is_quantized for matrix in matrices)
    call = [
        *(_matrix(writer, matrix, index, expert is not None) for index, matrix in enumerate(matrices)),
        f"const {NAME}_env env{{z, p{', order' if expert is not None else ''}}};",
        _parts(region),
    ]
    scratch = writer.arguments.text(None)
    group = "ACT_GROUP" if quantized else "0"
    if expert is None:
        writer.scratch.append(f"linear_scratch({rows}, {n}, threads)")
        return [*call, f"linear(t, slim::Linear{{{rows}, {n}, {NAME}_load, &env, parts, {len(region.parts)}, "
                       f"{group}, {scratch}}});"]  # fmt: skip
    return _experts(writer, region, call, rows, n, group, scratch)


def _experts(
    writer: Writer, region: Linear, call: list[str], rows: str, n: str, group: str, scratch: str
) -> list[str]:
    """Rows are sorted by expert; then each expert that has any is one product."""
    matrix = region.parts[0].products[0].matrix
    experts = writer.sizes.text(matrix.data.shape[0])
    assert region.source.expert is not None
    ids = writer.arguments.pointer(region.source.expert, writer.sizes)
    stride = writer.sizes.text(region.source.expert.strides[-1])
    writer.scratch.append(f"linear_scratch({rows}, {n}, threads) + expert_scratch({rows}, {experts})")
    run = [
        "const i64 count = starts[expert + 1] - starts[expert];",
        "if (count == 0) continue;",
        "const i64* order = starts + experts + 1 + starts[expert];",
        *call,
        f"linear(t, slim::Linear{{count, {n}, {NAME}_load, &env, parts, {len(region.parts)}, {group}, "
        f"{scratch} + expert_scratch({rows}, experts)}});",
        "t.barrier();",
    ]
    return [
        f"const i64 experts = {experts};",
        f"i64* const starts = (i64*){scratch};",
        f"if (t.id == 0) sort_by_expert({ids}, {stride}, {rows}, experts, starts);",
        "t.barrier();",
        "for (i64 expert = 0; expert < experts; expert++) {",
        *_indent(run),
        "}",
    ]


_FORMATS = {"f32": "float", "bf16": "bf16", "f16": "f16"}


def _matrix(writer: Writer, matrix: Matrix, index: int, stacked: bool) -> str:
    data = writer.arguments.text(matrix.data)
    if stacked:
        if matrix.is_quantized:  # a stack of packed weights begins with their distance, on a cache line of its own
            data = f"{data} + 64 + expert * *(const i64*){data}"
        else:
            data = f"{data} + expert * {matrix.m * matrix.n} * (i64)sizeof({_FORMATS[matrix.format]})"
    scale = "nullptr"
    if matrix.scale is not None:
        offset = f" + expert * {matrix.m}" if stacked else ""
        scale = f"(const float*){writer.arguments.text(matrix.scale)}{offset}"
    return f"const Matrix m{index}{{Format::{matrix.format}, {data}, {scale}, {matrix.m}, {matrix.n}, {matrix.group}}};"


def _parts(region: Linear) -> str:
    texts, index = [], 0
    for number_, part in enumerate(region.parts):
        count = len(part.products)
        lanes = ", ".join([f"&m{index + lane}" for lane in range(count)] + ["nullptr"] * (2 - count))
        texts.append(f"{{{{{lanes}}}, {count}, {NAME}_store{number_}, &env}}")
        index += count
    return f"const Part parts[] = {{{', '.join(texts)}}};"


def _helper(writer: Writer, name: str, parameters: str, body: list[str]) -> None:
    head = f"static void {NAME}_{name}(const void* held, i64 row, {parameters}) {{"
    env = [f"const auto& e = *(const {NAME}_env*)held;", "const Sizes& z = e.z;", "char* const* p = e.p;",
           "(void)z, (void)p;"]  # fmt: skip
    writer.helpers.append("\n".join([head, *_indent([*env, *body]), "}"]))


def _load_row(writer: Writer, region: Linear, row: list[str]) -> None:
    """Fills x with a row of the source, normalised where that was fused."""
    view, norm = region.source.view, region.source.norm
    lead = view.shape[:-1]
    loop = Loop([[d] for d in range(len(view.shape))], [*(f"o{d}" for d in range(len(lead))), "i"])
    text = writer.scalars(loop)
    width = writer.sizes.text(view.shape[-1])
    x = text.write(Load(view))
    body = _for(width, [*text.inner, f"x[i] = {x};"])
    if norm is not None:
        statistics = _STATISTICS[norm.kind]([], "x[i]", width, number(norm.eps))
        result = _normalised(writer, text, norm, "x[i]")
        body = [*body, *statistics, *_for(width, [f"x[i] = {result};"])]
    _helper(writer, "load", "float* x", [*row, *_decompose(writer.sizes, lead, "r", "o"), *text.outer, *body])


def _store_row(writer: Writer, part: Part, index: int, row: list[str]) -> None:
    """What is made of the results of one row, from ``column`` on."""
    lead = part.out.shape[:-1]
    loop = Loop([[d] for d in range(len(part.out.shape))], [*(f"o{d}" for d in range(len(lead))), "c"])
    lanes = {id(product): f"y[{lane}][i]" for lane, product in enumerate(part.products)}
    text = writer.scalars(loop, lanes)
    value = text.write(part.body)
    store = _assign(writer, text, part.out, value)
    uses_column = any("c" in line for line in (*text.inner, *store))
    column = ["const i64 c = column + i;"] if uses_column else []
    parameters = "i64 column, i64 count, const float* const* y"
    lines = [*row, *_decompose(writer.sizes, lead, "r", "o"), *text.outer]
    _helper(writer, f"store{index}", parameters, [*lines, *_for("count", [*column, *text.inner, *store])])


# -- attention ---------------------------------------------------------------------------------------------------------

_CACHE = {"float": "f32", "bf16": "bf16", "f16": "f16"}


def _attention(writer: Writer, region: Attention) -> list[str]:
    sizes, arguments = writer.sizes, writer.arguments
    batch, heads, queries, width = (sizes.text(size) for size in region.q.shape)
    kv_heads = sizes.text(region.k.shape[1])
    value_width = sizes.text(region.v.shape[3])
    cached = region.start is not None
    keys = sizes.text(region.start + region.q.shape[2] if cached else region.k.shape[2])  # type: ignore[operator]
    fields: dict[str, str] = {
        "batch": batch, "heads": heads, "kv_heads": kv_heads, "queries": queries, "key_width": width,
        "value_width": value_width, "keys": keys, "start": sizes.text(region.start) if cached else "0",
        "scale": number(region.scale), "softcap": number(region.softcap or 0.0),
        "causal": "true" if region.causal else "false", "window": str(region.window or 0),
    }  # fmt: skip

    def place(name: str, view: View | None, strides: Sequence[str], dims: Sequence[int], kind: str = "float") -> None:
        if view is None:
            return
        fields[name] = arguments.pointer(view, sizes, element=f"const {kind}" if name != "out" else kind)
        fields.update({stride: sizes.text(view.strides[d]) for stride, d in zip(strides, dims, strict=True)})

    for name, view in (("q", region.q), ("k", region.k), ("v", region.v), ("out", region.out)):
        place(name, view, [f"{name}_batch", f"{name}_head", f"{name}_token"], (0, 1, 2))
    for name, view in (("k_cache", region.k_cache), ("v_cache", region.v_cache)):
        if view is not None:
            stored = STORED[view.buffer.dtype]
            short = "kc" if name == "k_cache" else "vc"
            fields[name] = arguments.pointer(view, sizes, element=stored)
            fields["cache_format"] = f"Format::{_CACHE[stored]}"
            fields |= {f"{short}_{d}": sizes.text(view.strides[i]) for i, d in enumerate(("batch", "head", "token"))}
    if region.rope is not None:
        cos, sin, interleaved = region.rope
        place("cos", cos, ("rope_batch", "rope_token"), (0, 1))
        place("sin", sin, (), ())
        fields["rope_width"] = sizes.text(2 * cos.shape[-1])
        fields["interleaved"] = "true" if interleaved else "false"
    place("key_mask", region.key_mask, ("mask_batch",), (0,), "u8")
    place("bias", region.bias, ("bias_batch", "bias_head", "bias_query", "bias_key"), (0, 1, 2, 3))
    place("sinks", region.sinks, (), ())
    place("slopes", region.slopes, (), ())
    fields["scratch"] = arguments.text(None)
    shape = f"{batch}, {heads}, {kv_heads}, {queries}, {keys}, {width}, {value_width}"
    writer.scratch.append(f"attention_scratch({shape}, threads)")
    lines = ["slim::Attention a{};", *(f"a.{name} = {value};" for name, value in fields.items()), "attention(t, a);"]
    return lines


_WRITERS: dict[type, Callable[[Writer, Any], list[str]]] = {
    Pointwise: _pointwise, Norm: _norm, Reduce: _reduce, Scan: _scan, TopK: _topk, Linear: _linear,
    Attention: _attention,
}  # fmt: skip

__all__ = ["F32", "Kernel", "Writer", "contiguous_strides", "same"]
