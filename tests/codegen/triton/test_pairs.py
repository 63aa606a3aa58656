"""Results that go to columns of their own: what both kernels of a pair of low rank do, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from slim.codegen.regions.pointwise import op
from slim.codegen.regions.products import Linear, Pair, Placed
from slim.codegen.regions.scalars import Lane, Load

pytest.importorskip("triton")

from benchmarks.pairs import RandomPairs
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.runtime.compiled import CompiledModel
from tests.codegen.triton.run import run
from tests.codegen.triton.test_linear import ROWS, TOLERANCE, Case, node
from tests.compiled import difference

WHOLE = 40  # columns


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [True, False], ids=["and side by side", "alone"])
@pytest.mark.parametrize("format", ["f32", "int4"])
def test_each_result_goes_to_its_column(rows: tuple[int, ...], dtype: torch.dtype, beside: bool, format: str) -> None:
    case = Case(rows, 96, dtype).normed("rms").part(format, 24, 32 if format == "int4" else 0)
    (part,) = case.parts
    columns = torch.randperm(WHOLE)
    places = case.held("columns", columns, torch.int64).slice(0, 8, 24)
    residual = case.held("residual", torch.randn(*rows, WHOLE), dtype)
    out = case.held("whole", torch.full((*rows, WHOLE), 77.0), dtype, "output")
    pair = Pair(node(), out.shape, case.x, part.products[0], part.body, "order")
    part.placed = Placed(places, pair, op("add", Lane(pair), Load(residual)), out)
    if not beside:
        part.out = None
    run(Linear(node(), case.source, case.parts), case.tensors)
    (results,) = case.wanted
    wanted = torch.full((*rows, WHOLE), 77.0).double()
    chosen = columns[8:32]
    wanted[..., chosen] = results + case.tensors[residual.buffer].double()[..., chosen]
    assert difference(case.tensors[out.buffer], wanted) < TOLERANCE[dtype]
    if part.out is not None:
        assert difference(case.tensors[part.out.buffer], results) < TOLERANCE[dtype]


class FeedForward(nn.Module):
    """Gated, with its norm and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.gate, self.up = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.down = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, 40)])
def test_a_feed_forward_of_pairs_says_what_the_graph_does(rows: tuple[int, int]) -> None:
    torch.manual_seed(0)
    program = lift(FeedForward().eval(), (torch.randn(2, 3, 32),))
    RandomPairs(0.6, multiple=1).run(program, Context())
    kernels, eager = (CompiledModel(program, target) for target in ("cuda", "eager"))
    x = torch.randn(*rows, 32)
    assert difference(kernels(x.to(kernels.device)).cpu(), eager(x)) < 1e-5
