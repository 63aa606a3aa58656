"""What is cut into which regions: golden lines for whole models, and what must not be fused."""

import pytest
import torch
from torch import nn

from slim.codegen.regions.describe import describe
from slim.codegen.regions.lower import lower
from slim.compiler.lift import lift
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.uses import DEQUANTIZE
from slim.passes import Quantize
from slim.runtime.binding import bind_cache
from tests.compiled import check_golden, lifted, pair
from tests.programs import program


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_regions_of_a_step_are_the_golden_ones(name):
    program = bind_cache(pair(name)[1].program, masked=True, last_only=True)
    check_golden(f"{name}.regions", describe(lower(program)) + "\n")


def lines(module: nn.Module, *inputs: torch.Tensor) -> list[str]:
    return describe(lower(lift(module, inputs))).splitlines()


def test_a_norm_that_others_read_too_is_stored_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            h = self.norm(x)
            return self.a(h) + h

    found = lines(Shared(), torch.randn(3, 8))
    assert [line.split()[0] for line in found] == ["layer", "linear"]
    assert "{add, add}" in found[1]


def test_rows_of_a_batch_may_turn_by_one_table():
    text = """
        q = slim.rope.default(x, weights["cos"], weights["sin"])
        k = slim.rope.default(y, weights["cos"], weights["sin"])
        z = slim.attention.default(q, k, x, causal=True, layer=0, scale=0.5)
        return (z,)
    """
    tables = {"cos": torch.rand(1, 5, 2), "sin": torch.rand(1, 5, 2)}
    region, _ = lower(program(text, tables, "x: f32[2, 4, 5, 4], y: f32[2, 4, 5, 4]")).regions
    assert [table.strides for table in region.rope[:2]] == [(0, 2, 1)] * 2


def test_linears_over_the_same_rows_are_one_sweep_unless_one_needs_the_other():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return torch.relu(a), b * 2, self.c(a * 3)

    found = lines(Chain(), torch.randn(3, 8))
    sweeps = [line for line in found if line.startswith("linear")]
    assert len(sweeps) == 2
    assert "a.weight" in sweeps[0]
    assert "b.weight" in sweeps[0]
    assert "c.weight" in sweeps[1]


def test_three_products_in_one_sum_are_two_at_a_time():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.a(x) * self.b(x) + self.c(x)

    first, second = lines(Sum(), torch.randn(3, 8))
    assert (first.count("&"), second.count("&")) == (0, 1)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_tied_table_is_never_dequantised_as_a_whole(weights):
    """The head reads what is stored, and a lookup the rows that it needs."""
    passes = [Quantize(weights, group_size=16 if weights == "int4" else None, method="rtn", head=True)]
    after, _ = run_pipeline(lifted("llama-mha"), passes, Context())
    (table,) = [node for node in after.nodes(DEQUANTIZE) if len(node.users) == 2]
    regions = lower(bind_cache(after, masked=True, last_only=True)).regions
    made = [buffer.shape for region in regions for buffer in region.writes() if buffer.kind == "temp"]
    assert tuple(table.meta["val"].shape) not in made
