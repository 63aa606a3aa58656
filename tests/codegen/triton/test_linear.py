"""Every kernel of a linear computes what its region says, against float64 by hand, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from slim.codegen.regions.pointwise import op
from slim.codegen.regions.products import Linear, Matrix, Part, Product, Source
from slim.codegen.regions.scalars import Lane, Load, Scalar
from slim.codegen.regions.schedule import Norm
from slim.codegen.regions.views import Buffer, View
from slim.compiler.dialect import quant

pytest.importorskip("triton")

from slim.codegen.triton.kernel import Config, Kernel
from tests.codegen.triton.run import run

FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def node() -> fx.Node:
    return fx.Graph().placeholder("linear")


@dataclass
class Case:
    """A linear being built, with what its buffers hold and what it must compute."""

    rows: tuple[int, ...] = (1,)
    n: int = 64
    dtype: torch.dtype = torch.float32
    tensors: dict[Buffer, Tensor] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    wanted: list[Any] = field(default_factory=list)
    norm: Norm | None = None
    scale: View | None = None
    own_step: bool = False
    expert: View | None = None

    def __post_init__(self) -> None:
        self.x = self.held("x", torch.randn(*self.rows, self.n), self.dtype)
        self.input = self.tensors[self.x.buffer].double()

    def held(self, name: str, tensor: Tensor, dtype: torch.dtype, kind: str = "input") -> View:
        buffer = Buffer(kind, name, dtype, tuple(tensor.shape))  # type: ignore[arg-type]
        self.tensors[buffer] = tensor.to(dtype)
        return buffer.view()

    def normed(self, kind: str, offset: float = 0.0) -> Case:
        gain = self.held("gain", torch.rand(self.n) + 0.5, self.dtype, "weight")
        bias = self.held("shift", torch.randn(self.n), self.dtype, "weight") if kind == "layer" else None
        self.norm = Norm(node(), kind, Load(self.x), self.x.shape, gain, bias, 1e-5, offset)  # type: ignore[arg-type]
        x = self.input
        mean = x.mean(-1, keepdim=True) if kind == "layer" else 0.0
        x = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        self.input = x * (self.tensors[gain.buffer].double() + offset)
        if bias is not None:
            self.input += self.tensors[bias.buffer].double()
        return self

    @property
    def source(self) -> Source:
        return Source(self.x, self.norm, self.expert, self.scale, self.own_step)

    def rounded(self, by_row: bool = True, own: bool = False) -> Case:
        """In steps that are given, a row's or one for all, or in what the kernels find to be the row's own."""
        steps = (self.input.abs().amax(-1) / 127) if by_row else self.input.abs().amax() / 127
        steps = steps.float()
        name = "steps"
        view = self.held(name, steps.expand(self.rows).contiguous() if by_row else steps.reshape(1), torch.float32)
        self.own_step = own
        if not own:
            self.scale = view if by_row else View(view.buffer, self.rows, (0,) * len(self.rows))
        held = self.tensors[view.buffer].double().reshape(*self.rows, 1) if by_row else steps.double()
        self.input = (self.input / held).round().clamp(-128, 127) * held
        return self

    def experts(self, count: int, chosen: list[int]) -> Case:
        self.expert = self.held("chosen", torch.tensor(chosen), torch.int64)
        self.count = count
        return self

    def weight(self, format: str, m: int, group: int = 0) -> tuple[Matrix, Tensor]:
        """A random weight, as it is stored and as it is meant; "int4-int3" is int4 with zero points packed as int3."""
        format, _, zeros = format.partition("-")
        lead = (self.count,) if self.expert is not None else ()
        name = f"w{len(self.tensors)}"
        if format in FLOATS:
            data = self.held(name, torch.randn(*lead, m, self.n), FLOATS[format], "weight").buffer
            return Matrix(format, data, None, m, self.n), self.tensors[data].double()
        stored, whole = self._stored(format, (*lead, m, self.n))
        data = self.held(name, stored, stored.dtype, "weight").buffer
        shape = (*lead, m, self.n // group) if group else (*lead, m)
        step = 0.1 * torch.rand(shape) + 0.01
        scale = self.held(f"{name}_scale", step, torch.float32 if group == 16 else self.dtype, "weight").buffer
        steps = self.tensors[scale].double()
        steps = steps.repeat_interleave(group, -1) if group else steps[..., None]
        if not zeros:
            return Matrix(format, data, scale, m, self.n, group), whole * steps
        stored, points = self._stored(zeros, shape, 4 if format == "int3" else 8)
        zero = self.held(f"{name}_zero", stored, stored.dtype, "weight").buffer
        whole = (whole - points.repeat_interleave(group, -1)) * steps
        return Matrix(format, data, scale, m, self.n, group, zero, zeros), whole

    @staticmethod
    def _stored(format: str, shape: tuple[int, ...], most: int = 128) -> tuple[Tensor, Tensor]:
        """Random numbers as they lie in memory, and as they are; integers from -most to most - 1."""
        if format == "fp8":
            numbers = torch.randn(shape).to(torch.float8_e4m3fn)
            return numbers.view(torch.uint8), numbers.double()
        if format == "nf4":
            stored = quant.pack_nf4(torch.randint(0, 16, shape))
            return stored, torch.ops.slim.unpack_nf4(stored).double()
        most = min(most, {"int8": 128, "int4": 8, "int3": 4}[format])
        whole = torch.randint(-most, most, shape).to(torch.int8)
        pack = {"int8": lambda q: q, "int4": quant.pack_int4, "int3": quant.pack_int3}[format]
        return pack(whole), whole.double()

    def part(self, format: str, m: int, group: int = 0, kind: str = "plain") -> Case:
        """Adds a part: "plain", "bias", "gate" (two products) or "residual"."""
        matrices = [self.weight(format, m, group) for _ in range(2 if kind == "gate" else 1)]
        source = self.source
        products = tuple(Product(matrix, source, (*self.rows, m), node()) for matrix, _ in matrices)
        results = [self._times(whole) for _, whole in matrices]
        out = self.held(f"out{len(self.parts)}", torch.full((*self.rows, m), 77.0), self.dtype, "output")
        body, wanted = self._body(kind, products, results, m)
        self.parts.append(Part(products, body, out))
        self.wanted.append(wanted)
        return self

    def _times(self, weight: Tensor) -> Tensor:
        if self.expert is None:
            return self.input @ weight.T
        return torch.einsum("tn,tmn->tm", self.input, weight[self.tensors[self.expert.buffer]])

    def _body(self, kind: str, products: Any, results: list[Tensor], m: int) -> tuple[Scalar, Tensor]:
        if kind == "gate":
            body = op("mul", op("silu", Lane(products[0])), Lane(products[1]))
            return body, torch.nn.functional.silu(results[0]) * results[1]
        if kind == "plain":
            return Lane(products[0]), results[0]
        other = torch.randn(m) if kind == "bias" else torch.randn(*self.rows, m)
        view = self.held(f"{kind}{len(self.parts)}", other, self.dtype)
        return op("add", Lane(products[0]), Load(view.expand((*self.rows, m)))), (
            results[0] + self.tensors[view.buffer].double()
        )

    def check(self, config: Config | None = None, tolerance: float | None = None) -> list[Kernel]:
        """Runs it, and compares every part."""
        ran = run(Linear(node(), self.source, self.parts), self.tensors, config=config)
        for part, wanted in zip(self.parts, self.wanted, strict=True):
            got = self.tensors[part.out.buffer].double()
            size = wanted.abs().max().item()
            assert (got - wanted).abs().max().item() <= (tolerance or TOLERANCE[self.dtype]) * size
        return ran


FORMATS = [
    ("f32", 0, 70), ("bf16", 0, 70), ("f16", 0, 70), ("int8", 0, 70), ("int8", 16, 80), ("int4", 0, 70),
    ("int4", 32, 96), ("fp8", 0, 70), ("fp8", 32, 96), ("nf4", 0, 70), ("nf4", 16, 80), ("int3", 0, 72),
    ("int3", 32, 96), ("int4-int8", 32, 96), ("int4-int4", 16, 96), ("int4-int8", 80, 80), ("int3-int8", 96, 96),
    ("int3-int3", 32, 256), ("int4-int3", 16, 128),
]  # fmt: skip
ROWS = [(1,), (2, 3), (3, 90)]


@pytest.mark.parametrize(("format", "group", "n"), FORMATS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_format_is_multiplied(format: str, group: int, n: int, rows: tuple[int, ...]) -> None:
    ran = [kernel.name for kernel in Case(rows, n).part(format, 9, group).check()]
    copied = [] if format in FLOATS else ["dequantize_weight"]  # many rows read a copy in their own type
    assert ran == {(1,): ["linear_one_row"], (2, 3): ["linear_few_rows"], (3, 90): [*copied, "linear_tiles"]}[rows]


@pytest.mark.parametrize("format", ["f32", "bf16", "f16", "int8", "int4", "fp8", "nf4", "int3-int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
def test_half_precision_rows(format: str, dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    case = Case(rows, 96, dtype)
    if rows != ROWS[-1]:  # there the norm is a kernel of its own
        case.normed("rms")
    case.part(format, 16, 32 if format.startswith("int") else 0).check()


@pytest.mark.parametrize(("kind", "offset"), [("rms", 0.0), ("rms", 1.0), ("layer", 0.0)])
@pytest.mark.parametrize("format", ["f32", "int4"])
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_normalised_first(kind: str, offset: float, format: str, rows: tuple[int, ...]) -> None:
    Case(rows, 70).normed(kind, offset).part(format, 17).check()


@pytest.mark.parametrize("rows", ROWS)
def test_what_follows_is_fused(rows: tuple[int, ...]) -> None:
    (*_, kernel) = (
        Case(rows).normed("rms").part("f32", 17, kind="bias").part("f32", 16).part("f32", 20, kind="residual").check()
    )
    assert [pointer.name for pointer in kernel.pointers].count("x") == 1


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_gate_and_up_are_one_sweep(rows: tuple[int, ...], format: str) -> None:
    Case(rows).normed("rms").part(format, 10, kind="gate").check()


@pytest.mark.parametrize("rows", ROWS)
def test_weights_of_different_formats_are_kernels_of_one_stage(rows: tuple[int, ...]) -> None:
    ran = Case(rows).normed("rms").part("int8", 8).part("bf16", 6).part("int8", 9).part("int4", 8, 32).check()
    assert len([kernel for kernel in ran if kernel.name.startswith("linear")]) == 3


def split(rows: int, columns: int) -> Config:
    blocks = dict(BLOCK_N=16, BLOCK_K=columns, SPLIT_K=3, num_warps=4)
    return blocks | (dict(STAGES=2) if rows == 1 else dict(BLOCK_M=16, num_stages=2))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("format", ["f32", "int8", "int3"])
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_programs_can_share_a_block_by_its_columns(rows: int, format: str, norm: str | None) -> None:
    case = Case((rows,), 4128)
    if norm:
        case.normed(norm)
    case.part(format, 17, kind="gate").part(format, 8, kind="gate").check(split(rows, 512))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("step", ["row", "all", "own"])
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
def test_rows_are_rounded_to_int8(rows: tuple[int, ...], step: str, norm: str | None) -> None:
    case = Case(rows, 70)
    if norm:
        case.normed(norm)
    case.rounded(step != "all", step == "own")
    ran = case.part("int8", 17, kind="bias").check(tolerance=1e-2 if norm else 2e-6)
    assert len(ran) == (1 if rows == (1,) else 2)  # several rows are rounded once, not by each program


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("format", "group"),
    [("int4", 0), ("int8", 32), ("int4-int8", 32), ("fp8", 0), ("f32", 0), ("int3", 0), ("nf4", 0), ("int3-int8", 32)],
)
def test_rounded_rows_meet_any_format(rows: tuple[int, ...], format: str, group: int) -> None:
    Case(rows, 96).rounded().part(format, 9, group).check()


def test_sums_of_integers_are_exact() -> None:
    for rows in ROWS:
        case = Case(rows, 2048)
        case.tensors[case.x.buffer].copy_(torch.randint(120, 128, (*rows, 2048)).float())
        case.input = case.tensors[case.x.buffer].double()
        view = case.held("steps", torch.ones(1), torch.float32)
        case.scale = View(view.buffer, rows, (0,) * len(rows))
        case.part("int8", 16)
        matrix = case.parts[0].products[0].matrix
        case.tensors[matrix.data].copy_(torch.randint(120, 128, (16, 2048)))
        case.tensors[matrix.scale].fill_(1.0)  # type: ignore[index]
        case.wanted = [case.input @ case.tensors[matrix.data].double().T]
        case.check(tolerance=1e-12 if case.wanted[0].max() < 2**24 else 2**-24)


@pytest.mark.parametrize(
    ("format", "group"), [("f32", 0), ("int8", 0), ("int4-int8", 32), ("fp8", 0), ("int3", 32), ("nf4", 0)]
)
@pytest.mark.parametrize("chosen", [[2], [0, 3, 3, 1, 0], [4] * 40 + [1] * 30 + [0, 4]])
def test_rows_choose_their_matrices(format: str, group: int, chosen: list[int]) -> None:
    case = Case((len(chosen),), 96).experts(5, chosen).part(format, 9, group, "gate")
    ran = case.check()
    assert [kernel.name for kernel in ran] == (
        ["experts_one_row"] if len(chosen) <= 64 else ["experts_sort", "experts_tiles"]
    )


@pytest.mark.parametrize("count", [1, 70])
def test_experts_take_normalised_and_rounded_rows(count: int) -> None:
    for own in (False, True):
        case = Case((count,), 64).experts(3, [i % 2 for i in range(count)]).normed("rms").rounded(own=own)
        case.part("int8", 32).check(tolerance=1e-2)
    Case((count,), 64).experts(3, [i % 2 for i in range(count)]).normed("layer").part("f32", 32).check()


@pytest.mark.parametrize("rows", [(1,), (6,), (70,)])
def test_rows_may_lie_anywhere(rows: tuple[int, ...]) -> None:
    case = Case((rows[0], 2), 64)
    case.x = View(case.x.buffer, (rows[0], 64), (128, 1), 64)
    case.input, case.rows = case.input[:, 1], rows
    case.part("f32", 20).check()


@pytest.mark.parametrize("rows", [1, 16, 20, 64, 65, 300])
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_each_number_of_rows_has_its_kernels(rows: int, format: str) -> None:
    ran = [kernel.name for kernel in Case((rows,), 32).part(format, 16).check()]
    few = "linear_one_row" if rows == 1 else "linear_few_rows"
    many = ["dequantize_weight", "linear_tiles"] if format == "int4" else ["linear_tiles"]
    assert ran == ([few] if rows <= 256 else many)
