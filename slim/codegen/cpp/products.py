"""Kernels that call the library's matrix products: what loads their rows, and what takes their results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slim.codegen.cpp.loops import STATISTICS, normalised
from slim.codegen.cpp.text import Loop, ScalarText, number
from slim.codegen.cpp.writer import NAME, Writer, assign, decompose, indented, loop_over, writes
from slim.codegen.regions.products import Linear, Matrix, Part
from slim.codegen.regions.scalars import Load
from slim.codegen.regions.views import Size


@writes(Linear)
def _linear(writer: Writer, region: Linear) -> list[str]:
    expert = region.source.expert
    fields = "const Sizes& z; char* const* p; Thread& t;" + (" const i64* order;" if expert is not None else "")
    row = ["const i64 r = e.order[row];"] if expert is not None else ["const i64 r = row;"]
    writer.helpers.append(f"struct {NAME}_env {{ {fields} }};")
    _load_row(writer, region, row)
    _row_step(writer, region, row)
    for index, part in enumerate(region.parts):
        _store_row(writer, part, index, row)
    matrices = [product.matrix for part in region.parts for product in part.products]
    rows = writer.sizes.text(math.prod(region.source.view.shape[:-1]))
    n = writer.sizes.text(region.source.view.shape[-1])
    packed = any(matrix.format not in _IN_PLACE for matrix in matrices)
    call = [
        *(_matrix(writer, matrix, index, expert is not None) for index, matrix in enumerate(matrices)),
        f"const {NAME}_env env{{z, p, t{', order' if expert is not None else ''}}};",
        _parts(region),
    ]
    scratch = writer.arguments.text(None)
    tail = ["ACT_GROUP" if packed else "0", scratch]
    if region.source.is_rounded:
        tail += [f"{NAME}_step", "true" if region.source.scale is not None else "false"]
    if expert is None:
        writer.scratch.append(f"linear_scratch({rows}, {n}, threads)")
        return [*call, f"linear(t, slim::Linear{{{rows}, {n}, {NAME}_load, &env, parts, {len(region.parts)}, "
                       f"{', '.join(tail)}}});"]  # fmt: skip
    return _experts(writer, region, call, rows, n, tail)


def _experts(writer: Writer, region: Linear, call: list[str], rows: str, n: str, tail: list[str]) -> list[str]:
    """Rows are sorted by expert; then each expert that has any is one product."""
    matrix = region.parts[0].products[0].matrix
    experts = writer.sizes.text(matrix.data.shape[0])
    assert region.source.expert is not None
    group, scratch, *step = tail
    rest = ", ".join([group, f"{scratch} + expert_scratch({rows}, experts)", *step])
    ids = writer.arguments.pointer(region.source.expert, writer.sizes)
    stride = writer.sizes.text(region.source.expert.strides[-1])
    writer.scratch.append(f"linear_scratch_up_to({rows}, {n}, threads) + expert_scratch({rows}, {experts})")
    run = [
        "const i64 count = starts[expert + 1] - starts[expert];",
        "if (count == 0) continue;",
        "const i64* order = starts + experts + 1 + starts[expert];",
        *call,
        f"linear(t, slim::Linear{{count, {n}, {NAME}_load, &env, parts, {len(region.parts)}, {rest}}});",
        "t.barrier();",
    ]
    return [
        f"const i64 experts = {experts};",
        f"i64* const starts = (i64*){scratch};",
        f"if (t.id == 0) sort_by_expert(t, {ids}, {stride}, {rows}, experts, starts);",
        "t.barrier();",
        "for (i64 expert = 0; expert < experts; expert++) {",
        *indented(run),
        "}",
    ]


_IN_PLACE = {"f32": "float", "bf16": "bf16", "f16": "f16", "fp8": "fp8"}  # read as PyTorch keeps them


def _matrix(writer: Writer, matrix: Matrix, index: int, stacked: bool) -> str:
    data = writer.arguments.text(matrix.data)
    if stacked:
        if (
            matrix.format not in _IN_PLACE
        ):  # a stack of packed weights begins with their distance, on a cache line of its own
            data = f"{data} + 64 + expert * *(const i64*){data}"
        else:
            data = f"{data} + expert * {matrix.m * matrix.n} * (i64)sizeof({_IN_PLACE[matrix.format]})"
    scale = "nullptr"
    if matrix.scale is not None:
        groups = matrix.n // matrix.group if matrix.group else 1
        offset = f" + expert * {matrix.m * groups}" if stacked else ""
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


def _helper(writer: Writer, name: str, parameters: str, body: list[str], result: str = "void") -> None:
    head = f"static {result} {NAME}_{name}(const void* held, i64 row, {parameters}) {{"
    env = [f"const auto& e = *(const {NAME}_env*)held;", "const Sizes& z = e.z;", "char* const* p = e.p;",
           "Thread& t = e.t;", "(void)z, (void)p, (void)t;"]  # fmt: skip
    writer.helpers.append("\n".join([head, *indented([*env, *body]), "}"]))


def _load_row(writer: Writer, region: Linear, row: list[str]) -> None:
    """Fills x with a row of the source, normalised where that was fused."""
    view, norm = region.source.view, region.source.norm
    lead = view.shape[:-1]
    loop = Loop([[d] for d in range(len(view.shape))], [*(f"o{d}" for d in range(len(lead))), "i"])
    text = writer.scalars(loop)
    width = writer.sizes.text(view.shape[-1])
    x = text.write(Load(view))
    body = loop_over(width, [*text.inner, f"x[i] = {x};"])
    if norm is not None:
        statistics = STATISTICS[norm.kind]([], "x[i]", width, number(norm.eps))
        result = normalised(writer, text, norm, "x[i]")
        body = [*body, *statistics, *loop_over(width, [f"x[i] = {result};"])]
    _helper(writer, "load", "float* x", [*row, *decompose(writer.sizes, lead, "r", "o"), *text.outer, *body])


def _row_step(writer: Writer, region: Linear, row: list[str]) -> None:
    """By what a row is rounded to int8, where the Program says so."""
    view, scale = region.source.view, region.source.scale
    if region.source.own_step:
        lines = [f"return token_scale(x, {writer.sizes.text(view.shape[-1])});"]
    elif scale is not None:
        lead = scale.shape
        loop = Loop([*([d] for d in range(len(lead))), []], [*(f"o{d}" for d in range(len(lead))), "i"])
        text = writer.scalars(loop)
        step = text.write(Load(scale))
        index = decompose(writer.sizes, lead, "r", "o")
        lines = ["(void)x;", *row, *index, *text.outer, *text.inner, f"return {step};"]
    else:
        return
    _helper(writer, "step", "const float* x", lines, "float")


def _store_row(writer: Writer, part: Part, index: int, row: list[str]) -> None:
    """What is made of the results of one row, from ``column`` on: side by side, and each at a column of its own."""
    lanes = {id(product): f"y[{lane}][i]" for lane, product in enumerate(part.products)}
    lines, text = _scalars(writer, part.shape, ("o", "c"), lanes)
    value = text.write(part.body)
    stores = assign(writer, text, part.out, value) if part.out is not None else []
    uses_column = any("c" in line for line in (*text.inner, *stores))
    lines = [*row, *lines, *text.outer]
    inner = [*(["const i64 c = column + i;"] if uses_column else []), *text.inner, *stores]
    if part.placed is not None:
        more, placed = _scalars(writer, part.placed.out.shape, ("w", "d"), {id(part.placed.pair): value})
        value = placed.write(part.placed.body)
        stores = assign(writer, placed, part.placed.out, value)
        columns = writer.arguments.pointer(part.placed.columns, writer.sizes)
        lines += [*more, *placed.outer]
        inner += [f"const i64 d = {columns}[column + i];", *placed.inner, *stores]
    _helper(
        writer, f"store{index}", "i64 column, i64 count, const float* const* y", [*lines, *loop_over("count", inner)]
    )


def _scalars(
    writer: Writer, shape: Sequence[Size], names: tuple[str, str], lanes: dict[int, str]
) -> tuple[list[str], ScalarText]:
    """Statements that find the indices of row ``r``, called by the first of ``names``; text with the last as column."""
    first, column = names
    lead = shape[:-1]
    loop = Loop([[d] for d in range(len(shape))], [*(f"{first}{d}" for d in range(len(lead))), column])
    text = ScalarText(writer.sizes, writer.arguments, loop, lanes, "" if first == "o" else first)
    return decompose(writer.sizes, lead, "r", first), text
