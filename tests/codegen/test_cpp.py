"""Generated C++ computes what the Program says: every operation, odd shapes, segments, bad input."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slim
from slim import errors
from slim.codegen import build
from slim.codegen.cpp.executable import CppExecutable
from slim.codegen.eager import EagerExecutable
from slim.compiler.lift import lift
from slim.compiler.program import Program

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def both(program: Program, *inputs: Tensor) -> tuple[CppExecutable, list[tuple[Tensor, Tensor]]]:
    """The executable, and (generated, eager) for each output."""
    generated = CppExecutable(program)
    return generated, list(zip(generated(*inputs), EagerExecutable(program)(*inputs), strict=True))


def check(function: Callable[..., Any], *inputs: Tensor, segments: int = 1, tolerance: float = 2e-6) -> CppExecutable:
    program = lift(Function(function), inputs)
    generated, pairs = both(program, *inputs)
    assert generated.form.segments == segments, generated.form.foreign
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    return generated


# -- pointwise ---------------------------------------------------------------------------------------------------------

UNARY = (
    torch.neg, torch.exp, torch.tanh, torch.erf, torch.sigmoid, torch.sin, torch.cos, torch.abs, torch.floor,
    torch.ceil, torch.round, torch.trunc, torch.sign, torch.square, torch.relu, nn.functional.silu, nn.functional.gelu,
    nn.functional.softplus, nn.functional.leaky_relu, torch.expm1,
    lambda x: nn.functional.gelu(x, approximate="tanh"), lambda x: x.clamp(-0.5, 0.7), lambda x: x.clamp_min(0.1),
    lambda x: x**3, lambda x: x / 3, lambda x: 2 - x, lambda x: x.to(torch.int64), lambda x: x > 0.5,
    lambda x: torch.logical_not(x > 0), lambda x: torch.where(x > 0, x, -1.0), lambda x: x % 0.7,
)  # fmt: skip
POSITIVE = (torch.log, torch.log1p, torch.sqrt, torch.rsqrt, torch.reciprocal, lambda x: x**0.5, lambda x: x**1.7,
            lambda x: torch.log2(x))  # fmt: skip


def test_functions_of_one_number():
    x = torch.randn(3, 37) * 3
    x[0, :4] = torch.tensor([0.0, -0.0, 40.0, -40.0])
    check(lambda x: tuple(f(x) for f in UNARY), x)


def test_functions_of_a_positive_number():
    check(lambda x: tuple(f(x) for f in POSITIVE), torch.rand(5, 19) * 9 + 1e-3)


def test_functions_of_two_numbers_broadcast():
    def function(a: Tensor, b: Tensor, m: Tensor) -> Any:
        return (
            a + b, a - 2 * b, torch.maximum(a, b), torch.minimum(a, b), a / (b.abs() + 1), torch.sub(a, b, alpha=0.3),
            a.masked_fill(m, 7.0), torch.where(m, a, b), (a > b) & m, (a > b) | m, a == b,
            torch.pow(a.abs() + 0.1, b),
        )  # fmt: skip

    check(function, torch.randn(4, 1, 21), torch.randn(5, 21), torch.rand(4, 5, 1) > 0.5)


def test_integers_keep_pythons_division():
    def function(a: Tensor, b: Tensor) -> Any:
        return a + b, a * b, a // b, a % b, torch.div(a, b, rounding_mode="trunc"), a / b, a > b, -a, a.float()

    check(function, torch.randint(-50, 50, (41,)), torch.tensor([-7, 7, 3, -3, 1] * 8 + [2]))


def test_infinities_of_a_mask_stay():
    def function(x: Tensor, m: Tensor) -> Any:
        return torch.softmax(x.masked_fill(m, float("-inf")), -1), torch.where(m, float("inf"), x)

    mask = torch.rand(6, 13) > 0.7
    mask[:, 0] = False
    check(function, torch.randn(6, 13), mask)


def test_half_precision_is_computed_in_float():
    x = torch.randn(7, 33, dtype=torch.bfloat16)
    program = lift(Function(lambda x: (x * 1.5 + 2, torch.exp(x))), (x,))
    for (got, _), wanted in zip(both(program, x)[1], (x.float() * 1.5 + 2, torch.exp(x.float())), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=4e-3, atol=4e-3)


# -- shapes, rows, indices ---------------------------------------------------------------------------------------------


def test_views_move_no_numbers_and_lose_none():
    def function(x: Tensor) -> Any:
        return (
            x.transpose(0, 2).reshape(5, -1), x.permute(1, 2, 0) * 2, x[:, 1:4, ::2],
            x.unsqueeze(1).expand(-1, 2, -1, -1), x.flip(1), torch.cat([x, x * 2, x[:, :1]], dim=1),
            torch.stack([x, -x], dim=2), x.repeat(2, 1, 3), x[:, 2],
            x.split([1, 3, 2], dim=1)[1], x.chunk(2, dim=1)[0] + 1, torch.tril(x), x.repeat_interleave(3, dim=1),
            x.reshape(4, 6, 5).squeeze(), x.unbind(0)[3],
        )  # fmt: skip

    check(function, torch.randn(4, 6, 5))


def test_reductions_over_any_dimensions():
    def function(x: Tensor) -> Any:
        return (
            x.sum(), x.sum(1), x.mean((0, 2), keepdim=True), x.amax(-1), x.amin(0), x.argmax(-1), (x > 0).any(1),
            (x > -9).all(), x.var(-1), x.std(1, keepdim=True), torch.softmax(x, 1), x.cumsum(1), x.prod(2),
            x.mean(-1) * 2 + 1,
        )  # fmt: skip

    check(function, torch.randn(4, 7, 5), tolerance=1e-5)


def test_norms_at_every_width():
    for width in (1, 5, 16, 67):
        layer = nn.LayerNorm(width)
        rms = nn.RMSNorm(width)
        check(lambda x, a=layer, b=rms: (a(x), b(x) + 1, torch.softmax(x, -1)), torch.randn(3, 2, width))


def test_reads_at_computed_indices():
    table = nn.Parameter(torch.randn(11, 6))

    def function(tokens: Tensor, x: Tensor) -> Any:
        return (
            nn.functional.embedding(tokens, table) * 2, x.index_select(1, tokens[0] % 4),
            x.gather(1, (tokens % 4)[:, :2].unsqueeze(-1).expand(-1, -1, 3)), x[:, tokens[0] % 4], torch.arange(7) * 2,
            torch.topk(x, 2).values, torch.topk(x, 2).indices, x.scatter(-1, (x > 0).long()[..., :2], 7.0),
        )  # fmt: skip

    check(function, torch.randint(0, 11, (2, 5)), torch.randn(2, 4, 3))


def test_an_index_outside_of_its_table_is_an_error_and_not_a_crash():
    table = nn.Parameter(torch.randn(11, 6))
    tokens = torch.randint(0, 11, (2, 5))
    generated = check(lambda t: nn.functional.embedding(t, table), tokens)
    for wrong in (11, -1, 2**40):
        with pytest.raises(errors.BadInput, match="outside of the table"):
            generated(torch.full((2, 5), wrong))
    assert generated(tokens)[0].isfinite().all()


# -- linears -----------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 40), n=st.integers(1, 90), m=st.integers(1, 70), bias=st.booleans(), gated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_linears_of_odd_shapes(rows: int, n: int, m: int, bias: bool, gated: bool, dtype: torch.dtype):
    a, b = nn.Linear(n, m, bias=bias, dtype=dtype), nn.Linear(n, m, bias=bias, dtype=dtype)

    def function(x: Tensor) -> Tensor:
        y = nn.functional.silu(a(x)) * b(x) if gated else a(x)
        return y + 1.0

    x = torch.randn(2, rows, n, dtype=dtype)
    check(function, x, tolerance=1e-5 if dtype == torch.float32 else 3e-2)


def test_threads_agree():
    layer = nn.Sequential(nn.Linear(67, 131), nn.GELU(), nn.Linear(131, 45), nn.LayerNorm(45))
    x = torch.randn(33, 67)
    generated = CppExecutable(lift(layer, (x,)))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(generated(x)[0])
    finally:
        torch.set_num_threads(before)
    for result in results:
        torch.testing.assert_close(result, layer(x), rtol=1e-5, atol=1e-5)


def test_calls_from_several_threads_take_turns():
    layer = nn.Sequential(nn.Linear(31, 64), nn.ReLU(), nn.Linear(64, 9))
    generated = CppExecutable(lift(layer, (torch.randn(3, 31),)))
    inputs = [torch.randn(3, 31) for _ in range(8)]
    results: dict[int, Tensor] = {}

    def work(index: int) -> None:
        for _ in range(20):
            results[index] = generated(inputs[index])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        torch.testing.assert_close(results[index], layer(x), rtol=1e-5, atol=1e-5)


# -- segments ----------------------------------------------------------------------------------------------------------


def test_what_has_no_kernel_runs_through_pytorch_between_segments():
    first, conv, last = nn.Linear(12, 16), nn.Conv1d(16, 8, 3), nn.Linear(6, 5)

    def function(x: Tensor) -> Tensor:
        hidden = torch.tanh(first(x)).transpose(1, 2)
        return last(conv(hidden)).relu()

    x = torch.randn(3, 8, 12)
    generated = check(function, x, segments=2, tolerance=1e-5)
    (site, reason) = generated.form.foreign[0]
    assert "conv1d" in reason
    assert "conv" in site
    with generated.timed() as seconds:  # region by region, to the same result
        one_by_one = generated(x)
    assert torch.equal(one_by_one[0], generated(x)[0])
    assert len(seconds) == len(generated.stages) >= 3
    assert all(spent > 0.0 for spent in seconds)


def test_a_program_without_any_kernel_still_runs():
    generated = check(nn.Conv1d(4, 8, 3), torch.randn(2, 4, 9))
    assert len(generated.form.foreign) == 1


def test_the_report_counts_segments_and_says_why():
    conv = nn.Conv1d(4, 8, 3)
    model = nn.Sequential(nn.Linear(9, 9), conv, nn.ReLU())
    compiled = slim.compile(model, example_inputs=torch.randn(2, 4, 9), target="cpu")
    assert compiled.report.forms["whole"].segments == 2
    assert "to PyTorch: aten.conv1d.default has no kernel" in str(compiled.report)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_inputs_of_another_shape_or_type_are_refused():
    generated = CppExecutable(lift(nn.Linear(12, 4), (torch.randn(3, 12),)))
    with pytest.raises(errors.BadInput, match=r"shape is \[3, 13\]"):
        generated(torch.randn(3, 13))
    with pytest.raises(errors.BadInput, match="float64"):
        generated(torch.randn(3, 12, dtype=torch.float64))


def test_inputs_may_be_strided():
    layer = nn.Linear(12, 4)
    generated = CppExecutable(lift(layer, (torch.randn(3, 12),)))
    x = torch.randn(12, 3).t()
    torch.testing.assert_close(generated(x)[0], layer(x), rtol=1e-5, atol=1e-6)
