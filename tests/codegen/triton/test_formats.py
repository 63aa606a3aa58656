"""Programs of quantised weights and rounded activations: what the kernels write is what the IR says."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from slim.codegen.regions.describe import describe
from slim.codegen.triton.device import host
from slim.codegen.triton.executable import TritonExecutable
from slim.compiler.dialect import quant
from tests.codegen.test_cpp_formats import FORMATS, PACKED, ROUNDINGS, linear
from tests.programs import program

ROWS = [(1, 1), (1, 5), (2, 140)]
STATIC = """
    q{1} = slim.quantize.default({0}, weights["{1}"])
    r{1} = slim.dequantize.default(q{1}, weights["{1}"])
"""
OWN = """
    s{1} = slim.token_scale.default({0})
    q{1} = slim.quantize.default({0}, s{1}, axis=1)
    r{1} = slim.dequantize.default(q{1}, s{1}, axis=1)
"""


def lines(rounding: str) -> str:
    """norm, rounding, gate and up, rounding, down."""
    return f"""
        n = slim.rms_norm.default(x, weights["gain"], eps=1e-5)
        {rounding.format("n", "a")}
        wg = slim.dequantize.default(weights["gate"], weights["gate_scale"], axis=0)
        wu = slim.dequantize.default(weights["up"], weights["gate_scale"], axis=0)
        g = aten.linear.default(ra, wg)
        u = aten.linear.default(ra, wu)
        c = aten.silu.default(g)
        h = aten.mul.Tensor(c, u)
        {rounding.format("h", "b")}
        unpacked = slim.unpack_int4.default(weights["down"])
        wd = slim.dequantize.default(unpacked, weights["down_scale"], axis=1, group_size=16)
        d = aten.linear.default(rb, wd)
        y = aten.add.Tensor(d, x)
        return (y,)
    """


def weights() -> dict[str, torch.Tensor]:
    numbers = torch.randint(-128, 128, (2, 80, 64), dtype=torch.int8)
    return {
        "gain": torch.rand(64) + 0.5, "gate": numbers[0], "up": numbers[1], "gate_scale": torch.rand(80) * 2e-3,
        "down": quant.pack_int4(torch.randint(-8, 8, (64, 80))), "down_scale": torch.rand(64, 5) * 0.05,
        "a": torch.tensor(0.02), "b": torch.tensor(0.01),
    }  # fmt: skip


@pytest.mark.parametrize("rounding", [STATIC, OWN])
@pytest.mark.parametrize("rows", ROWS)
def test_rounded_rows_give_what_the_ir_says(rounding: str, rows: tuple[int, int]):
    made = program(lines(rounding), weights(), inputs="x: f32[B, S, 64]")
    x = torch.randn(*rows, 64)
    (wanted,) = made.run(x)
    executable = TritonExecutable(made, host())
    assert not executable.schedule.foreign
    got = executable(x.to(host().place))[0].cpu()
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-2  # a number may be rounded the other way


@pytest.mark.parametrize(("rounding", "rows", "kernels"), [(STATIC, 1, 2), (OWN, 1, 2), (STATIC, 5, 3), (OWN, 5, 4)])
def test_one_row_is_rounded_where_it_is_read(rounding: str, rows: int, kernels: int):
    executable = TritonExecutable(program(lines(rounding), weights(), inputs="x: f32[B, S, 64]"), host())
    call = executable.bind(torch.randn(1, rows, 64, device=host().place))
    assert len(call.steps) == kernels


def test_what_one_step_rounds_is_stored_as_int8_by_the_linear_that_makes_it():
    executable = TritonExecutable(program(lines(STATIC), weights(), inputs="x: f32[B, S, 64]"), host())
    gate, down = executable.schedule.regions
    assert next(iter(gate.writes())).dtype == torch.int8
    assert next(iter(down.reads())).dtype == torch.int8


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    kind=st.sampled_from(FORMATS), m=st.integers(1, 40), groups=st.integers(1, 3),
    group=st.sampled_from([0, 16, 32, 48, 96, 128]), zeros=st.sampled_from(["", "int8", "packed"]),
    rows=st.sampled_from([1, 2, 17, 40, 260]), rounding=st.sampled_from(list(ROUNDINGS)),
)  # fmt: skip
def test_a_linear_of_any_format_equals_the_ir(
    kind: str, m: int, groups: int, group: int, zeros: str, rows: int, rounding: str
):
    if kind == "int3" and group % 32:
        group *= 2
    zeros = {"packed": kind}.get(zeros, zeros) if group and kind in ("int4", "int3") else ""
    groups = 8 if zeros in PACKED else groups  # packed zero points come by the byte
    made = linear(kind, m, group * groups or 8 * groups, group, zeros, rounding)
    x = torch.randn(rows, group * groups or 8 * groups)
    (wanted,) = made.run(x)
    executable = TritonExecutable(made, host())
    assert f"[w {kind}" in describe(executable.schedule), "the weight is read as it is stored"
    got = executable(x.to(host().place))[0].cpu()
    assert float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)) < 1e-5
