"""Every weight format and every rounding of activations: generated C++ computes what the IR says."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim import errors
from slim.codegen import build
from slim.codegen.cpp.executable import CppExecutable
from slim.codegen.eager import EagerExecutable
from slim.codegen.regions.describe import describe
from slim.compiler.dialect.quant import pack_int3, pack_int4, pack_nf4
from slim.compiler.program import Program
from tests.programs import program

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

FORMATS = ("int8", "int4", "int3", "nf4", "fp8")
PACKED = ("int4", "int3", "nf4")
LIMITS = {"int8": (-128, 128), "int4": (-8, 8), "int3": (-4, 4), "nf4": (0, 16)}
PACK = {"int4": pack_int4, "int3": pack_int3, "nf4": pack_nf4}
EXACT = 2e-6  # of the largest result: float32 rounding


def numbers(kind: str, *shape: int) -> Tensor:
    """Random numbers of a format, as they are held."""
    if kind == "fp8":
        return torch.randn(*shape).mul_(20).to(torch.float8_e4m3fn)
    low, high = LIMITS[kind]
    q = torch.randint(low, high, shape, dtype=torch.int8 if low < -8 else torch.int16).to(torch.int8)
    return PACK[kind](q) if kind in PACK else q


def quantised(kind: str, shape: tuple[int, ...], group: int = 0, zeros: str = "") -> tuple[str, dict[str, Tensor]]:
    """(lines that make ``w`` of weights, the weights)."""
    grid = (*shape[:-1], shape[-1] // group) if group else shape[:-1]
    weights = {"w": numbers(kind, *shape), "w_scale": torch.rand(grid) * 0.02 + 1e-3}
    if group and group % 32:
        weights["w_scale"] = weights["w_scale"].half()
    lines = [f'u = slim.unpack_{kind}.default(weights["w"])'] if kind in PACKED else []
    operands = ["u" if kind in PACKED else 'weights["w"]', 'weights["w_scale"]']
    if zeros:
        weights["w_zero"] = numbers(zeros, *grid)
        if zeros in PACKED:
            lines.append(f'z = slim.unpack_{zeros}.default(weights["w_zero"])')
        operands.append("z" if zeros in PACKED else 'weights["w_zero"]')
    grain = f"axis={len(shape) - 1}, group_size={group}" if group else f"axis={len(shape) - 2}"
    lines.append(f"w = slim.dequantize.default({', '.join(operands)}, {grain})")
    return "\n".join(lines), weights


ROUNDINGS = {
    "none": "",
    "token": "s = slim.token_scale.default(x)\nq = slim.quantize.default(x, s, axis=0)\n"
    "x1 = slim.dequantize.default(q, s, axis=0)\n",
    "static": 'q = slim.quantize.default(x, weights["s"])\nx1 = slim.dequantize.default(q, weights["s"])\n',
}


def compare(made: Program, *inputs: Tensor) -> tuple[CppExecutable, float]:
    """The executable, and how far its results are from the eager ones, as a part of the largest."""
    generated = CppExecutable(made)
    assert not generated.form.foreign
    worst = 0.0
    for got, wanted in zip(generated(*inputs), EagerExecutable(made)(*inputs), strict=True):
        assert got.shape == wanted.shape
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)))
    return generated, worst


def linear(kind: str, m: int, n: int, group: int, zeros: str, rounding: str) -> Program:
    lines, weights = quantised(kind, (m, n), group, zeros)
    weights["s"] = torch.tensor(0.02)
    x = "x" if rounding == "none" else "x1"
    return program(f"{ROUNDINGS[rounding]}{lines}\ny = aten.linear.default({x}, w)\nreturn (y,)", weights,
                   f"x: f32[B, {n}]")  # fmt: skip


@settings(max_examples=24, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    kind=st.sampled_from(FORMATS), m=st.integers(1, 70), groups=st.integers(1, 5),
    group=st.sampled_from([0, 16, 32, 48, 64, 96, 128]), zeros=st.sampled_from(["", "int8", "packed"]),
    rows=st.sampled_from([1, 2, 5, 16, 17, 40]), rounding=st.sampled_from(list(ROUNDINGS)),
)  # fmt: skip
def test_a_linear_of_any_format_equals_the_ir(
    kind: str, m: int, groups: int, group: int, zeros: str, rows: int, rounding: str
):
    if kind == "int3" and group % 32:
        group *= 2
    zeros = {"packed": kind}.get(zeros, zeros) if group and kind in ("int4", "int3") else ""
    groups = -(-groups // 8) * 8 if zeros in PACKED else groups  # packed zero points come by the byte
    n = group * groups or 8 * groups
    made = linear(kind, m, n, group, zeros, rounding)
    generated, error = compare(made, torch.randn(rows, n))
    assert "[" + f"w {kind}" in describe(generated.schedule), "the weight is read as it is stored"
    own = rounding == "none" and kind != "fp8"  # the kernels' own rounding of activations is not the IR's
    assert error < (0.05 if own else EXACT)


@pytest.mark.parametrize("kind", ["int4", "int3"])
def test_a_row_may_have_one_zero_point(kind: str):
    lines, weights = quantised(kind, (21, 64))
    weights["w_zero"] = torch.randint(-100, 100, (21,), dtype=torch.int8)
    lines = lines.replace('weights["w_scale"]', 'weights["w_scale"], weights["w_zero"]')
    body = f"{ROUNDINGS['token']}{lines}\ny = aten.linear.default(x1, w)\nreturn (y,)"
    for rows in (1, 33):
        generated, error = compare(program(body, weights, "x: f32[B, 64]"), torch.randn(rows, 64))
        assert error < EXACT
    assert f"{kind}[21,64] g64 zeros" in describe(generated.schedule)


@pytest.mark.parametrize("rounding", ["token", "static"])
@pytest.mark.parametrize("rows", [1, 20])
def test_rounding_happens_where_rows_are_loaded(rounding: str, rows: int):
    """Two linears, of floats and of integers, over one norm: one sweep, and nothing else is computed."""
    lines, weights = quantised("int4", (40, 64), 32)
    weights |= {"s": torch.tensor(0.02), "gain": torch.rand(64), "f": torch.randn(24, 64)}
    body = f"""{ROUNDINGS[rounding].replace("(x,", "(h,").replace("(x)", "(h)")}{lines}
        a = aten.linear.default(x1, w)
        b = aten.linear.default(x1, weights["f"])
        return (a, b)"""
    made = program(f'h = slim.rms_norm.default(x, weights["gain"], eps=1e-6)\n{body}', weights, "x: f32[B, 64]")
    generated, error = compare(made, torch.randn(rows, 64))
    assert describe(generated.schedule).startswith("linear int8(rms(x)) x [w int4[40,64] g32 -> output_0; f f32[24,64]")
    assert len(generated.schedule.regions) == 1
    assert error < 1e-2  # a norm's last digit may decide which way a number is rounded


def test_rounded_numbers_that_others_read_too_are_there_for_them():
    lines, weights = quantised("int8", (40, 64))
    body = (
        f"{ROUNDINGS['token']}{lines}\ny = aten.linear.default(x1, w)\nz = aten.mul.Tensor(x1, s1)\nreturn (y, z, q, s)"
    )
    body = body.replace("z =", "s1 = aten.unsqueeze.default(s, 1)\nz =")
    made = program(body, weights, "x: f32[B, 64]")
    x = torch.randn(9, 64)
    x[3] = 0
    got, wanted = CppExecutable(made)(x), EagerExecutable(made)(x)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_static_step_clips():
    weights = quantised("int8", (40, 64))[1] | {"s": torch.tensor(1e-3)}
    lines = quantised("int8", (40, 64))[0]
    made = program(
        f"{ROUNDINGS['static']}{lines}\ny = aten.linear.default(x1, w)\nreturn (y,)", weights, "x: f32[B, 64]"
    )
    for rows in (1, 7, 30):
        _, error = compare(made, torch.randn(rows, 64))
        assert error < EXACT


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("group", "zeros"), [(0, ""), (32, ""), (32, "int8")])
@pytest.mark.parametrize("rounding", ["token", "none"])
def test_experts_of_any_format(kind: str, group: int, zeros: str, rounding: str):
    if zeros and kind not in ("int4", "int3"):
        pytest.skip("only these have zero points")
    lines, weights = quantised(kind, (3, 20, 64), group, zeros)
    x = "x" if rounding == "none" else "x1"
    body = f"{ROUNDINGS[rounding]}{lines}\ny = slim.expert_linear.default({x}, w, None, expert)\nreturn (y,)"
    made = program(body, weights, "x: f32[T, 64], expert: i64[T]")
    _, error = compare(made, torch.randn(11, 64), torch.randint(0, 3, (11,)))
    assert error < (0.05 if rounding == "none" and kind != "fp8" else EXACT)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("group", "zeros"), [(0, ""), (16, ""), (16, "int8"), (16, "packed")])
def test_rows_of_a_table_of_any_format(kind: str, group: int, zeros: str):
    if zeros and kind not in ("int4", "int3"):
        pytest.skip("only these have zero points")
    lines, weights = quantised(kind, (50, 128), group, kind if zeros == "packed" else zeros)
    made = program(f"{lines}\ny = aten.embedding.default(w, tokens)\nreturn (y,)", weights, "tokens: i64[B, S]")
    _, error = compare(made, torch.randint(0, 50, (2, 7)))
    assert error < EXACT


def test_formats_whose_groups_do_not_fit_are_not_read_side_by_side():
    """int3 is read 32 numbers at a time, and here a scale ends after 16."""
    first, weights = quantised("int3", (20, 64), 32)
    second, more = quantised("int4", (20, 64), 16)
    weights |= {name.replace("w", "v"): weight for name, weight in more.items()}
    second = second.replace('"w', '"v').replace("u =", "t =").replace("(u,", "(t,").replace("w =", "v =")
    body = f"{first}\n{second}\na = aten.linear.default(x, w)\nb = aten.linear.default(x, v)\nreturn (a, b)"
    for rows in (1, 20):
        generated, error = compare(program(body, weights, "x: f32[B, 64]"), torch.randn(rows, 64))
        assert error < 0.05
    assert len(generated.schedule.regions) == 2


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from(["int8", *PACKED]), m=st.integers(1, 40), groups=st.integers(1, 3), experts=st.integers(0, 3),
    zeros=st.booleans(),
)  # fmt: skip
def test_packed_weights_come_back_bit_for_bit(kind: str, m: int, groups: int, experts: int, zeros: bool):
    shape = (*((experts,) if experts else ()), m, groups * 32)
    lines, weights = quantised(kind, shape, 32, "int8" if zeros and kind in ("int4", "int3") else "")
    before = {name: weight.clone() for name, weight in weights.items()}
    call = "slim.expert_linear.default(x, w, None, expert)" if experts else "aten.linear.default(x, w)"
    inputs = f"x: f32[T, {groups * 32}]" + (", expert: i64[T]" if experts else "")
    made = program(f"{lines}\ny = {call}\nreturn (y,)", weights, inputs)
    CppExecutable(made)
    assert not isinstance(made.weights.raw("w"), Tensor)
    for name, weight in before.items():
        assert torch.equal(made.weights[name], weight), name


def test_what_is_no_number_in_fp8_is_refused():
    lines, weights = quantised("fp8", (20, 64))
    weights["w"][7, 40] = float("nan")
    made = program(f"{lines}\ny = aten.linear.default(x, w)\nreturn (y,)", weights, "x: f32[B, 64]")
    with pytest.raises(errors.NonFiniteWeight, match="NaN"):
        CppExecutable(made)
