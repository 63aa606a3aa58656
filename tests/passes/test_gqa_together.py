"""Attention fitted together: what the graph's region computes, that fits never lose, and what GQA makes of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.func import vjp

from slim import errors
from slim.compiler.passes_base import Context
from slim.compiler.pipeline import run_pipeline
from slim.compiler.program import Program
from slim.compiler.statistics import calibration_of
from slim.compiler.statistics.attention import watch
from slim.compiler.statistics.batches import Batch
from slim.passes import GQA
from slim.passes.heads import together
from slim.passes.heads.attend import Region
from slim.passes.heads.find import find_heads
from slim.passes.heads.together import Fit, fit_together
from tests.compiled import lifted, pair

TOKENS = [torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(i)) for i in range(6)]
NAMES = ["llama-mha", "gpt2", "gpt_neox", "opt", "qwen2", "gemma2", "bert"]


def batches(program: Program, given: Sequence[Any] = TOKENS) -> Sequence[Batch]:
    return calibration_of(program, Context(calibration=list(given)), "a test").batches


def regions(program: Program) -> list[Region]:
    return [Region.of(find_heads(program, node)) for node in program.attention_nodes()]


def seen(program: Program, nodes: Sequence[fx.Node], batch: Batch) -> dict[fx.Node, Any]:
    found: dict[fx.Node, Any] = {}
    watch(program, nodes, batch, lambda node, args, kwargs, result: found.update({node: result}))
    return found


def rounds(program: Program, given: Sequence[Any] = TOKENS) -> tuple[Program, Program, list[Fit]]:
    """The closed forms, what rounds make of them, and what these say."""
    closed = run_pipeline(program, [GQA(1, rounds=0)], Context(calibration=TOKENS))[0]
    fitted = closed.copy()
    heads = [region.heads for region in regions(fitted)]
    context = Context(calibration=list(given))
    fits = list(fit_together(fitted, program.copy(), heads, batches(program, given), context, 2, "a test"))
    return closed, fitted, fits


def parted(program: Program, original: Program) -> float:
    """How far the model's output is from what it was."""
    outputs = [[one.run(*batch.inputs)[0].float() for batch in batches(original)] for one in (program, original)]
    return float(sum((a - b).square().mean() for a, b in zip(*outputs, strict=True)))


# -- the region --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_region_gives_what_the_output_projection_reads(name: str) -> None:
    program = pair(name)[1].program
    (batch, *_) = batches(program)
    for region in regions(program):
        values = seen(program, [*region.linears, *region.outside, region.rows_out], batch)
        found = region.run(program, [values[node] for node in region.linears], values)
        torch.testing.assert_close(found.flatten(), values[region.rows_out].flatten(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama-mha", "gpt_neox", "gemma2"])
def test_it_can_be_differentiated_twice(name: str) -> None:
    """The derivative of the derivative backward, which is linear, is the one forward."""
    program = pair(name)[1].program
    (batch, *_) = batches(program)
    region = regions(program)[0]
    values = seen(program, [*region.linears, *region.outside], batch)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return region.run(program, [q, k, v], values)

    made = tuple(values[node] for node in region.linears)
    moves = tuple(torch.randn_like(each) for each in made)
    value, back = vjp(run, *made)
    (forward,) = vjp(back, torch.zeros_like(value))[1](moves)
    nearby = [run(*(a + sign * 1e-2 * b for a, b in zip(made, moves, strict=True))) for sign in (1.0, -1.0)]
    torch.testing.assert_close(forward, (nearby[0] - nearby[1]) / 2e-2, atol=5e-3, rtol=5e-2)


# -- fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_misses_more_after_the_rounds(name: str) -> None:
    program = lifted(name)
    closed, fitted, fits = rounds(program)
    assert len(fits) == len(program.attention_nodes())
    assert all(fit.after <= fit.before for fit in fits)
    assert any(fit.after < fit.before for fit in fits)
    for weight in closed.weights:
        assert fitted.weights.shape(weight) == closed.weights.shape(weight)
        assert fitted.weights.dtype(weight) == closed.weights.dtype(weight)
    assert parted(fitted, program) < parted(closed, program)


def test_pad_tokens_do_not_count() -> None:
    """The same sequences, padded on the right with other tokens."""
    program = lifted("llama-mha")
    rows = [row[None] for tokens in TOKENS for row in tokens]
    mask = torch.cat([torch.ones(1, 32), torch.zeros(1, 8)], 1).long()
    padded = [{"input_ids": torch.cat([row, row[:, :8]], 1), "attention_mask": mask} for row in rows]
    wanted, found = (rounds(program, given)[2] for given in (rows, padded))
    for a, b in zip(wanted, found, strict=True):
        assert (a.before, a.after) == pytest.approx((b.before, b.after), rel=1e-3)


def test_rounds_that_help_nothing_leave_every_weight_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "stepped", lambda layer, *_: {n: torch.zeros_like(v) for n, v in layer.all.items()})
    monkeypatch.setattr(together, "reads_best", lambda layer, _: layer)
    closed, fitted, fits = rounds(lifted("llama-mha"))
    assert all(fit.after == fit.before for fit in fits)
    assert "no round made" in str(fits[0])
    assert all(torch.equal(closed.weights[name], fitted.weights[name]) for name in closed.weights)


# -- in the pass -------------------------------------------------------------------------------------------------------


def test_one_sequence_is_not_enough_and_the_report_says_so() -> None:
    context = Context(calibration=[TOKENS[0][:1]])
    _, report = run_pipeline(lifted("llama-mha"), [GQA(2)], context)
    assert any("one sequence" in note for note in report.passes[0].notes)
    assert not any("fitted together" in note for note in report.passes[0].notes)


def test_sequences_are_taken_from_all_over_and_no_more_than_rounds_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_TOKENS", 64)
    program = lifted("llama-mha")
    every = batches(program)
    taken = together._taken(every, [region.heads for region in regions(program)], 3)
    assert len(taken) == 8  # three rounds of two, and two that are kept out
    assert torch.equal(taken[-1].inputs[0], TOKENS[5][1:2])


def test_rounds_need_something_that_is_fitted() -> None:
    for options in ({"method": "mean", "rounds": 1}, {"method": "procrustes", "rounds": 0}, {"rounds": -1}):
        with pytest.raises(errors.BadPassOption, match="rounds"):
            GQA(2, **options)
