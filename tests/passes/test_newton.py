"""Makers of neurons and their reader, fitted together: derivatives, what a fit reaches, and what Prune makes of it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim import errors
from slim.compiler.dependencies import Dependencies
from slim.compiler.dependencies.groups import Kind
from slim.compiler.gauss_newton import Layer, Sample, _Slope, fitted, reads_best
from slim.compiler.passes_base import Context
from slim.compiler.probe import make_probe
from slim.compiler.program import Program
from slim.compiler.statistics import checkpoint as checkpoints
from slim.compiler.statistics.gradients import Catching
from slim.passes import Prune
from slim.passes.pruning.makers import Makers, find_makers
from slim.passes.pruning.sites import find_sites
from slim.passes.pruning.work import Work
from tests.programs import lifted


def gated(seed: int, biased: bool, n: int = 6, k: int = 9, m: int = 5) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    return Layer(
        lambda made: torch.nn.functional.silu(made["gate"]) * made["up"],
        {"gate": normal(k, n), "up": normal(k, n)},
        {"up": normal(k)} if biased else {},
        normal(m, k),
        normal(m) if biased else None,
    )


def makers(program: Program) -> list[Makers]:
    sites, _ = find_sites(program, Dependencies(program))
    return [found for site in sites if (found := find_makers(site, None)) is not None]


# -- derivatives -------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_the_derivative_is_that_of_the_results_and_its_transpose_a_transpose(seed: int, biased: bool) -> None:
    layer, other = gated(seed, biased), gated(seed + 1, biased)
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))
    slope, step = _Slope(layer, rows), 1e-3
    assert torch.allclose(slope.result, layer(layer.all, rows), atol=1e-5)
    forward, backward = (layer(layer.moved(other.all, sign * step).all, rows) for sign in (1.0, -1.0))
    moved = slope.forth(other.all)
    assert torch.allclose(moved, (forward - backward) / (2 * step), atol=5e-3)
    found = slope.back(slope.result)
    across = sum(float((found[name] * other.all[name]).sum()) for name in found)
    assert across == pytest.approx(float((slope.result * moved).sum()) / len(rows), rel=1e-3, abs=1e-4)
    assert found.keys() == layer.all.keys()


# -- fits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
def test_what_a_layer_of_the_same_size_returns_is_found_again(biased: bool) -> None:
    teacher = gated(0, biased)
    rows = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1))
    start = teacher.moved(gated(1, biased).all, 0.3)
    wanted = teacher(teacher.all, rows)
    before = start.missing([Sample(rows, wanted)])
    found, missing = fitted(start, rows, wanted, rounds=5)
    assert before > 0.05
    assert missing < 0.1 * before
    assert found.missing([Sample(rows, wanted)]) == pytest.approx(missing, rel=0.5)


def noisy() -> tuple[Layer, torch.Tensor, torch.Tensor]:
    """A layer, 24 rows, and what they are to become: what it returns, and noise."""
    layer, generator = gated(2, biased=False), torch.Generator().manual_seed(3)
    rows = torch.randn(24, 6, generator=generator)
    return layer, rows, layer(layer.all, rows) + 0.5 * torch.randn(24, 5, generator=generator)


def test_a_fit_to_noise_is_not_taken() -> None:
    """The rows kept out tell that there is nothing to learn from the others."""
    layer, rows, wanted = noisy()
    found, missing = fitted(layer, rows, wanted, rounds=3)
    assert found is layer
    assert missing == fitted(layer, rows, wanted, rounds=0)[1]


def test_what_is_missing_is_told_of_a_reader_that_has_not_seen_the_rows_kept_out() -> None:
    layer, rows, wanted = noisy()
    start = reads_best(layer, [Sample(rows, wanted)])
    assert fitted(start, rows, wanted, rounds=0)[1] > 1.1 * start.missing([Sample(rows[7::8], wanted[7::8])])


# -- in a graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [("llama", 2), ("gpt2", 1), ("gemma", 2), ("phi3", 2), ("gpt_neox", 1), ("opt", 1), ("bert", 1), ("mixtral", 0)],
)
def test_makers_are_found_and_give_what_the_reader_reads(name: str, count: int) -> None:
    program = lifted(name)
    found = makers(program)
    layers = [site for site in find_sites(program, Dependencies(program))[0] if site.kind is Kind.NEURON]
    assert [len(each.linears) for each in found] == ([count] * len(layers) if count else [])
    assert layers
    for each in found:
        caught = Catching(program, [each.source, each.site.value])
        caught.run(*_inputs(program))
        rows, value = (caught.results[node].detach().flatten(0, -2) for node in (each.source, each.site.value))
        kept = torch.arange(value.shape[-1])[1::2]
        layer = each.layer(program, torch.eye(len(kept)), None, kept)
        torch.testing.assert_close(layer(layer.all, rows), value[:, kept], atol=1e-5, rtol=1e-4)


def _inputs(program: Program) -> tuple[torch.Tensor, ...]:
    return make_probe(program).inputs


def test_makers_that_the_walk_has_passed_are_left_alone() -> None:
    program = lifted("llama")
    site = next(s for s in find_sites(program, Dependencies(program))[0] if s.kind is Kind.NEURON)
    assert find_makers(site, site.linear.prev) is None


def tokens(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 96, (2, 24), generator=generator) for _ in range(count)]


def test_rounds_move_what_makes_neurons_too_and_bring_the_output_nearer() -> None:
    before = lifted("llama")
    probe = _inputs(before)
    closed, found = (before.copy() for _ in range(2))
    Prune(0.3, units="neurons", rounds=0).run(closed, Context(calibration=tokens(40)))
    Prune(0.3, units="neurons", rounds=2).run(found, Context(calibration=tokens(40)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert closed.weights.shape(name) == found.weights.shape(name)
    assert all(bool((before.weights[name] == row).all(1).any()) for row in closed.weights[name])
    assert not torch.allclose(closed.weights[name], found.weights[name], atol=1e-3)
    with torch.no_grad():
        wanted = before.run(*probe)[0]
        near, far = ((each.run(*probe)[0] - wanted).square().mean() for each in (found, closed))
    assert float(near) < float(far)


def test_makers_are_fitted_where_attention_reads_the_same_norm_beside_them() -> None:
    before, after = lifted("phi"), lifted("phi")
    Prune(0.2, units="neurons").run(after, Context(calibration=tokens(40)))
    name = makers(before)[0].layer(before, torch.eye(1), None, torch.arange(1)).weights.popitem()[0]
    assert not any(bool((before.weights[name] == row).all(1).any()) for row in after.weights[name])


def test_an_interrupted_fit_goes_on_where_it_was(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    whole, broken = lifted("llama"), lifted("llama")
    Prune(0.3).run(whole, Context(calibration=tokens()))
    made, calls = Work._made, []

    def stops(*args: object) -> dict[str, torch.Tensor]:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return made(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Work, "_made", stops)
    with pytest.raises(KeyboardInterrupt):
        Prune(0.3).run(broken.copy(), Context(calibration=tokens()))
    Prune(0.3).run(broken, Context(calibration=tokens()))
    assert len(calls) == 5  # of four sites the last alone was left
    for name in whole.weights:
        assert torch.equal(whole.weights[name], broken.weights[name]), name


def test_rounds_of_a_fit_that_is_not_made_are_refused() -> None:
    with pytest.raises(errors.BadPassOption, match="without refit=True"):
        Prune(0.2, "wanda", rounds=2)
    with pytest.raises(errors.BadPassOption, match="without refit=True"):
        Prune(0.2, refit=False, rounds=1)
    with pytest.raises(errors.BadPassOption, match="none go"):
        Prune(0.2, units="heads", rounds=1)
