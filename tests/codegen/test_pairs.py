"""Linears of low rank: what their pairs are cut into, and that generated C++ computes what the graph says."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slim
from benchmarks.pairs import RandomPairs
from slim.codegen import build
from slim.codegen.regions.describe import describe
from slim.codegen.regions.lower import lower
from slim.codegen.regions.pairs import inverse
from slim.codegen.regions.products import Linear
from slim.codegen.regions.schedule import Foreign, Pointwise
from slim.compiler.lift import lift
from slim.compiler.program import Program
from slim.compiler.uses import LINEAR
from slim.runtime.binding import bind_cache
from slim.runtime.compiled import CompiledModel
from tests.compiled import built, check_golden, difference, lifted, prompt

needs_compiler = pytest.mark.skipif(build.missing() is not None, reason=f"no C++ code here: {build.missing()}")

ARCHITECTURES = ("gpt2", "gemma2", "qwen2", "qwen3", "phi3", "gpt_neox", "opt", "mixtral")


@cache
def llama(storage: str) -> Program:
    """A small Llama whose linears are pairs."""
    return slim.compile(built("llama"), [RandomPairs(0.6, storage, 8)], target="eager", verify=False).program  # type: ignore[arg-type]


# -- regions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["pivot", "factors"])
def test_the_regions_of_a_step_are_the_golden_ones(storage: str):
    program = bind_cache(llama(storage), masked=True, last_only=True)
    check_golden(f"llama-{storage}.regions", describe(lower(program)) + "\n")


def test_a_layer_of_pairs_is_twelve_regions_and_one_more_where_gate_and_up_meet():
    """Dense it is five: q, k and v in one sweep, attention, o, gate and up in one sweep, down."""
    for storage, count in (("factors", 12), ("pivot", 13)):
        schedule = lower(bind_cache(llama(storage), masked=False, last_only=True))
        assert not schedule.foreign
        layers = len(built("llama").model.layers)
        table_norm_and_head = 5
        assert len(schedule.regions) == count * layers + table_norm_and_head


class Block(nn.Module):
    """What reads a linear: a bias, a residual, an activation, another linear's results, a view."""

    def __init__(self, n: int, m: int, dtype: torch.dtype):
        super().__init__()
        self.a, self.b = nn.Linear(n, m), nn.Linear(n, m, bias=False)
        self.c, self.norm = nn.Linear(m, n), nn.LayerNorm(n)
        self.to(dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        gated = torch.nn.functional.silu(self.a(h)) * self.b(h)
        return x + self.c(gated), self.a(x * 2).reshape(x.shape[0], -1)


def test_a_pair_that_a_residual_reads_is_two_sweeps_and_nothing_more():
    program = with_pairs(nn.Sequential(nn.Linear(32, 32)), torch.randn(3, 32))
    pivots, rest = lower(program).regions
    assert isinstance(pivots, Linear)
    assert isinstance(rest, Linear)
    assert pivots.parts[0].placed is not None
    assert rest.parts[0].out is None


def test_results_in_an_order_that_is_no_permutation_are_gathered():
    program = with_pairs(nn.Sequential(nn.Linear(32, 32)), torch.randn(3, 32))
    name = next(name for name in program.weights if name.endswith("order"))
    program.weights[name] = program.weights[name].clamp(max=20)
    assert [type(region) for region in lower(program).regions][-1] is Pointwise
    x = torch.randn(3, 32)
    assert torch.allclose(CompiledModel(program, "eager")(x), CompiledModel(program, "auto")(x), atol=1e-5)


def test_pivots_that_others_read_too_are_still_there():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    program = with_pairs(Both(), torch.randn(3, 32))
    (output,) = program.graph.find_nodes(op="output")
    pivots = next(iter(program.nodes(LINEAR)))
    output.args = ((*output.args[0], pivots),)
    schedule = lower(program)
    assert not any(isinstance(region, Foreign) for region in schedule.regions)
    assert sum(len(region.parts) for region in schedule.regions if isinstance(region, Linear)) == 2


def test_the_inverse_of_an_order_says_where_each_result_goes():
    order = torch.randperm(40)
    placed = torch.empty(40, dtype=torch.int64)
    placed[inverse(order)] = torch.arange(40)
    assert torch.equal(placed, order)


def with_pairs(module: nn.Module, *inputs: Tensor, keep: float = 0.6, multiple: int = 1) -> Program:
    program = lift(module.eval(), inputs)
    RandomPairs(keep, "pivot", multiple).run(program, slim.compiler.passes_base.Context())
    return program


# -- numbers -----------------------------------------------------------------------------------------------------------

# sizes of the block, type, passes behind, and how far the target may be from the IR's own numbers
BLOCKS = {
    "f32, odd sizes": (37, 51, torch.float32, 0.7, "", 1e-5),
    "bf16": (64, 96, torch.bfloat16, 0.5, "", 3e-2),
    "int8": (48, 80, torch.float32, 0.6, 'quantize("int8", method="rtn")', 0.06),
    "int4 in groups": (64, 96, torch.float32, 0.8, 'quantize("int4", group_size=16, method="rtn")', 0.06),
    "int8 rows": (
        48,
        80,
        torch.float32,
        0.6,
        'quantize("int8", activations="int8", method="rtn")',
        5e-3,
    ),  # a tie may turn
}


@cache
def block(name: str) -> tuple[CompiledModel, CompiledModel]:
    n, m, dtype, keep, passes, _ = BLOCKS[name]
    torch.manual_seed(0)
    multiple = 16 if passes else 1
    eager = slim.compile(
        Block(n, m, dtype).eval(), [RandomPairs(keep, "pivot", multiple), *([passes] if passes else [])],
        example_inputs=torch.randn(2, 3, n, dtype=dtype), target="eager", verify=False,
    )  # fmt: skip
    return CompiledModel(eager.program, "cpu"), eager


@needs_compiler
@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=10, deadline=None)
@given(rows=st.sampled_from([(1, 1), (1, 5), (2, 8), (3, 17), (1, 70), (5, 130)]), seed=st.integers(0, 99))
def test_any_number_of_rows(name: str, rows: tuple[int, int], seed: int):
    n, _, dtype, _, _, tolerance = BLOCKS[name]
    x = torch.randn(*rows, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
    generated, eager = block(name)
    for got, wanted in zip(generated(x), eager(x), strict=True):
        assert difference(got, wanted) < tolerance


@needs_compiler
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_stay_in_one_piece_and_say_the_same(name: str):
    eager = slim.compile(built(name), [RandomPairs(0.7, multiple=8)], target="eager", verify=False)
    generated = CompiledModel(eager.program, "cpu", report=slim.compiler.report.PipelineReport())
    tokens, mask = prompt()
    got, wanted = (model(tokens, attention_mask=mask).logits for model in (generated, eager))
    assert difference(got, wanted, mask) < 1e-4
    held = generated.new_cache(3, 12)
    got = generated(tokens, attention_mask=mask, past_key_values=held).logits
    assert difference(got, wanted, mask) < 1e-4
    assert not any(form.foreign for form in generated.report.forms.values())


@needs_compiler
def test_an_encoder_with_pairs_says_the_same():
    program = lifted("bert")
    RandomPairs(0.7, multiple=8).run(program, slim.compiler.passes_base.Context())
    tokens, mask = prompt()
    inputs = {"input_ids": tokens.flip(1), "attention_mask": mask.flip(1)}
    generated, eager = (CompiledModel(program, target) for target in ("cpu", "eager"))
    got, wanted = (model(**inputs)["last_hidden_state"] for model in (generated, eager))
    assert difference(got, wanted, inputs["attention_mask"]) < 1e-4


@needs_compiler
def test_a_model_with_pairs_comes_back_from_disk(tmp_path):
    model = slim.compile(
        built("llama"), [RandomPairs(0.6, multiple=16), 'quantize("int4", group_size=16, method="rtn")'],
        target="cpu", verify=False, strict=False,
    )  # fmt: skip
    tokens, _ = prompt(padded=False)
    model.save(tmp_path / "model")
    assert torch.equal(slim.load(tmp_path / "model", target="cpu")(tokens).logits, model(tokens).logits)
