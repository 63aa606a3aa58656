"""Kernels written from expressions: pointwise work, norms, reductions, running sums, the largest of a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.codegen.regions.schedule import Foreign
from slim.codegen.triton.device import host
from slim.codegen.triton.executable import TritonExecutable
from tests.programs import program

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check(lines: str, *inputs: torch.Tensor, tolerance: float = 2e-6, **options) -> TritonExecutable:
    """The kernels of ``lines`` give what the Program itself does."""
    made = program(lines, options.pop("weights", {}), **options)
    wanted_outputs = made.run(*inputs)
    executable = TritonExecutable(made, host())
    assert not executable.schedule.foreign, executable.schedule.foreign
    outputs = executable(*(x.to(executable.device.place) for x in inputs))
    for got, wanted in zip(outputs, wanted_outputs, strict=True):
        got = got.cpu()
        assert got.dtype == wanted.dtype
        if wanted.is_floating_point():
            scale = wanted.double().abs().max() + 1e-30
            assert float((got.double() - wanted.double()).abs().max() / scale) < tolerance
        else:
            assert torch.equal(got, wanted)
    return executable


UNARY = (
    "exp", "log", "log1p", "expm1", "tanh", "erf", "sigmoid", "silu", "gelu", "sin", "cos", "sqrt", "rsqrt", "floor",
    "ceil", "round", "trunc", "sign", "abs", "neg", "exp2", "log2", "reciprocal", "square",
)  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
def test_a_function_of_one_number_is_that_of_pytorch(name: str):
    x = torch.linspace(-4, 4, 2 * 5 * 8).reshape(2, 5, 8)
    if name in ("log", "log2", "sqrt", "rsqrt", "reciprocal", "log1p"):
        x = x.abs() + 0.01
    check(f"y = aten.{name}.default(x)\nreturn (y,)", x, tolerance=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [1, 7, 64, 300])
def test_norms_of_rows_of_any_width(kind: str, width: int, dtype: torch.dtype):
    x = torch.randn(2, 3, width).to(dtype)
    weights = {"g": torch.randn(width).to(dtype), "b": torch.randn(width).to(dtype)}
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    line = 'slim.rms_norm.default(x, weights["g"], eps=1e-5, offset=1.0)'
    if kind == "layer":
        line = 'slim.layer_norm.default(x, weights["g"], weights["b"], eps=1e-5)'
    tolerance = TOLERANCE[dtype]
    check(f"y = {line}\nreturn (y,)", x, weights=weights, inputs=f"x: {name}[B, S, {width}]", tolerance=tolerance)


@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_softmax_over_any_dimension(dim: int):
    check(f"y = aten.softmax.int(x, {dim})\nreturn (y,)", torch.randn(3, 5, 8))


@pytest.mark.parametrize("name", ["sum", "mean", "amax", "amin"])
@pytest.mark.parametrize("dims", ["[-1]", "[1]", "[0, 2]", "[0, 1]"])
def test_reductions_over_any_dimensions(name: str, dims: str):
    overload = {"sum": "dim_IntList", "mean": "dim"}.get(name, "default")
    call = f"aten.{name}.{overload}"
    check(f"y = {call}(x, {dims})\nreturn (y,)", torch.randn(3, 70, 8))


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_the_first_of_equal_numbers_is_found(name: str):
    x = torch.randint(-3, 3, (4, 5, 8)).float()
    check(f"y = aten.{name}.default(x, -1)\nreturn (y,)", x)


def test_running_sums():
    check(
        "y = aten.cumsum.default(x, 1)\nz = aten.cumsum.default(x, 2)\nreturn (y, z)",
        torch.randn(2, 41, 8),
        tolerance=1e-5,
    )


def test_the_largest_of_a_row_in_falling_order_also_beside_minus_infinity():
    x = torch.randn(2, 3, 8)
    x[0, 0, :6] = float("-inf")
    x[1, 1] = 1.0
    made = program("t = aten.topk.default(x, 3)\ny = t[0]\ni = t[1]\nreturn (y, i)", {})
    values, places = (t.cpu() for t in TritonExecutable(made, host())(x.to(host().place)))
    assert torch.equal(values, x.topk(3).values)
    assert torch.equal(x.gather(-1, places), values)
    assert all(len(set(row)) == 3 for row in places.flatten(0, 1).tolist())


def test_rows_of_a_table_are_picked_and_an_index_outside_is_refused():
    from slim import errors

    weights = {"t": torch.randn(11, 8)}
    lines = 'y = aten.embedding.default(weights["t"], x)\nreturn (y,)'
    executable = check(lines, torch.randint(0, 11, (3, 5)), weights=weights, inputs="x: i64[B, S]")
    with pytest.raises(errors.BadInput, match="outside"):
        executable(torch.tensor([[1, 11]], device=host().place))
    assert executable(torch.tensor([[1, 10]], device=host().place))[0].shape == (1, 2, 8)


@settings(max_examples=12, deadline=None)
@given(batch=st.integers(1, 4), length=st.integers(1, 40))
def test_pointwise_work_over_strided_and_broadcast_views(batch: int, length: int):
    lines = """
        t = aten.transpose.int(x, 1, 2)
        m = aten.mean.dim(x, [-1], True)
        d = aten.sub.Tensor(x, m)
        u = aten.transpose.int(d, 1, 2)
        s = aten.mul.Tensor(t, u)
        return (s,)
    """
    check(lines, torch.randn(batch, length, 8), tolerance=1e-5)


def test_what_has_no_kernel_runs_through_pytorch_between_kernels():
    made = program(
        "y = aten.mul.Tensor(x, 2.0)\nz = aten.sort.default(y)\ns = z[0]\nw = aten.add.Tensor(s, 1.0)\nreturn (w,)", {}
    )
    executable = TritonExecutable(made, host())
    assert any(isinstance(step, Foreign) for step in executable.unit.steps)
    x = torch.randn(2, 5, 8)
    assert torch.allclose(executable(x.to(host().place))[0].cpu(), (x * 2).sort().values + 1)
    assert [skip.reason for skip in executable.form.foreign]
