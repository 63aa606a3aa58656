"""Rounding one weight: every method keeps its promise on every grid, and the data-driven ones beat the plain ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim import errors
from slim.compiler.uses import UNPACKS
from slim.passes.rounding.awq import awq_factors
from slim.passes.rounding.curvature import Curvature
from slim.passes.rounding.gptq import descend, gptq
from slim.passes.rounding.grid import Grid
from slim.passes.rounding.methods import round_weight
from slim.passes.rounding.scales import layer_loss, refit, search

GRIDS = [
    Grid("int8"), Grid("int8", 16), Grid("int4", 16), Grid("int4", 16, symmetric=False), Grid("int4"),
    Grid("int3", 8), Grid("int3", 8, symmetric=False), Grid("nf4", 16), Grid("fp8"), Grid("fp8", 16),
]  # fmt: skip
METHODS = ["rtn", "search", "hqq", "awq", "gptq", "best"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def inputs(width, seed=0, rows=400):
    """Rows whose channels hang together and differ in size, as those of models do."""
    mix = torch.randn(width, width, generator=generator(seed)) / width**0.5
    sizes = torch.randn(width, generator=generator(seed + 1)).exp()
    noise = torch.randn(rows, width, generator=generator(seed + 2))
    return (noise @ mix + 0.3 * noise) * sizes


def curvature(width, seed=0):
    x = inputs(width, seed)
    return Curvature(x.T @ x / len(x))


def loss(weight, rounded, of):
    wrong = weight.double() - rounded.restored().double()
    return float(((wrong @ of.gram.double()) * wrong).sum())


# -- grids -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    grid=st.sampled_from(GRIDS),
    method=st.sampled_from(METHODS),
    rows=st.integers(1, 5),
    width=st.sampled_from([16, 32, 48]),
    log_size=st.floats(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_what_is_stored_unpacks_to_numbers_of_the_grid_whose_product_with_the_scale_is_what_is_restored(
    grid, method, rows, width, log_size, dtype, seed
):
    weight = (torch.randn(rows, width, generator=generator(seed)) * 10.0**log_size).to(dtype)
    rounded = round_weight(weight, grid, method, curvature(width, seed))
    stored = rounded.packed()
    unpack = UNPACKS.get(grid.format, lambda packed: packed)
    numbers = unpack(stored.numbers)
    zero = stored.zero_point
    if zero is not None:
        zero = unpack(zero) if zero.dtype == torch.uint8 else zero
        assert zero.shape == stored.scale.shape
        assert grid.low <= int(zero.min()) <= int(zero.max()) <= grid.high
    grain = dict(axis=stored.scale.dim() - 1, group_size=grid.group_size or None)
    assert torch.equal(rounded.restored(), torch.ops.slim.dequantize(numbers, stored.scale, zero, **grain))
    assert grid.low <= float(numbers.float().min()) <= float(numbers.float().max()) <= grid.high
    assert (stored.scale != 0).all()
    assert stored.scale.isfinite().all()
    assert stored.scale.dtype in ((torch.float16, torch.float32) if grid.group_size else (torch.float32,))
    if method in ("rtn", "search", "hqq"):  # the others move weights that the inputs do not tell apart
        assert (weight.float() - rounded.restored()).norm() < 0.5 * weight.float().norm()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bits_are_those_of_the_stored_tensors(grid):
    stored = round_weight(torch.randn(4, 256), grid, "rtn").packed()
    parts = [part for part in stored if part is not None]
    assert 8 * sum(part.nbytes for part in parts) == grid.bits(256) * 4 * 256


def test_numbers_that_are_of_the_grid_already_come_back_exactly():
    steps = torch.tensor([[-8, -5, 0, 7], [-8, 3, 1, 2]]).repeat(1, 4).float()
    for method in METHODS:
        rounded = round_weight(steps / 4, Grid("int4", 16), method, curvature(16))
        assert torch.equal(rounded.restored(), steps / 4), method


def test_rounding_to_nearest_takes_all_sixteen_steps_where_that_is_better():
    weight = torch.tensor([[8.0, -7.0, -6.0, 3.0], [-8.0, 7.0, 1.0, 2.0], [7.0, -7.0, 1.0, 3.0]])
    rounded = round_weight(weight, Grid("int4", 4), "rtn")
    assert rounded.scale.flatten().tolist() == [-1, 1, 1]
    assert torch.equal(rounded.restored(), weight)


def test_scales_are_half_precision_unless_that_cannot_hold_them():
    for size, dtype in ((1.0, torch.float16), (1e-7, torch.float32), (1e7, torch.float32)):
        assert round_weight(torch.randn(4, 64) * size, Grid("int4", 32), "rtn").scale.dtype == dtype


# -- bad and odd weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zeros_constants_and_single_spikes_are_met(grid, method):
    weight = torch.zeros(4, 48)
    weight[1] = 0.25
    weight[2, 7] = -3.0
    weight[3] = torch.randn(48, generator=generator(5))
    restored = round_weight(weight, grid, method, curvature(48)).restored()
    assert torch.equal(restored[0], weight[0])
    step = {"int3": 0.15, "int4": 0.08}.get(grid.format, 0.06)
    assert (restored[1:3] - weight[1:3]).abs().max() <= step * 3
    assert restored.isfinite().all()


@pytest.mark.parametrize("method", ["awq", "gptq", "best"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_channels_never_seen_and_one_that_dwarfs_the_rest_break_nothing(grid, method):
    x = inputs(32)
    x[:, 3:6] = 0
    x[:, 9] *= 1e4
    weight = torch.randn(8, 32, generator=generator(1))
    for rows in (x, torch.zeros(5, 32), x[:3]):
        seen = Curvature(rows.T @ rows / len(rows))
        restored = round_weight(weight, grid, method, seen).restored()
        assert restored.isfinite().all()
        assert (restored[:, 3:6] - weight[:, 3:6]).norm() < 0.5 * weight[:, 3:6].norm()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused_with_its_name(method):
    weight = torch.randn(2, 16)
    gram = torch.eye(16)
    gram[2, 2] = torch.inf
    with pytest.raises(errors.BadInput, match="gram: it holds NaN or infinity"):
        Curvature(gram)
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight[1, 3] = bad
        with pytest.raises(errors.BadInput, match="weight: it holds NaN or infinity"):
            round_weight(weight, Grid("int8"), method, curvature(16))


def test_what_does_not_fit_together_is_refused():
    weight = torch.randn(2, 20)
    for grid, complaint in [
        (Grid("int4", 16), "rows of 20 do not divide into groups of 16"),
        (Grid("int3", 4), "int3 packs 8 numbers together, and a row has 20"),
    ]:
        with pytest.raises(errors.BadInput, match=complaint):
            round_weight(weight, grid, "rtn")
    with pytest.raises(errors.BadInput, match="int8 has no zero point"):
        Grid("int8", symmetric=False)
    with pytest.raises(errors.BadInput, match="holds no number"):
        Grid("int8", -1)
    with pytest.raises(errors.BadInput, match="gptq rounds by statistics"):
        round_weight(weight, Grid("int8"), "gptq")
    with pytest.raises(errors.BadInput, match="of 16 channels, and the weight has 20"):
        round_weight(weight, Grid("int8"), "gptq", curvature(16))


# -- methods -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    grid=st.sampled_from([grid for grid in GRIDS if grid.format != "fp8"]),
    rows=st.integers(1, 8),
    width=st.sampled_from([16, 32, 144]),
    seed=st.integers(0, 2**20),
)
def test_best_loses_less_than_rounding_to_nearest_whatever_the_inputs(grid, rows, width, seed):
    weight, seen = torch.randn(rows, width, generator=generator(seed)), curvature(width, seed)
    plain, best = (loss(weight, round_weight(weight, grid, method, seen), seen) for method in ("rtn", "best"))
    assert best < plain


def test_methods_lose_less_in_their_order():
    """In sum over many weights; the bounds are far from what is measured, and far from no gain."""
    sums = dict.fromkeys(METHODS, 0.0)
    for seed in range(6):
        weight, seen = torch.randn(64, 128, generator=generator(seed)), curvature(128, seed)
        for method in METHODS:
            sums[method] += loss(weight, round_weight(weight, Grid("int3", 32), method, seen), seen)
    assert sums["search"] < 0.9 * sums["rtn"]
    assert sums["awq"] < 0.85 * sums["rtn"]
    assert sums["gptq"] < 0.6 * sums["rtn"]
    assert sums["best"] < 0.6 * sums["gptq"]


def test_hqq_fits_the_bulk_of_a_group_with_outliers():
    weight = torch.randn(64, 64, generator=generator(0))
    weight[:, ::16] *= 4
    bulk = torch.ones(64, dtype=torch.bool)
    bulk[::16] = False
    for grid in (Grid("int3", 16), Grid("int3", 16, symmetric=False), Grid("int4", 16)):
        wrong = [(round_weight(weight, grid, method).restored() - weight).abs() for method in ("rtn", "hqq")]
        plain, fitted = (each[:, bulk].norm() for each in wrong)
        assert fitted < plain
        lost = [each.unflatten(1, (4, 16)).pow(0.7).sum(-1) for each in wrong]
        assert (lost[1] <= lost[0] * (1 + 1e-4)).all()


def exhaustive(target, gram, scale, low, high):
    """The best numbers of all, for one row."""
    grids = torch.meshgrid(*[torch.arange(low, high + 1.0)] * target.shape[1], indexing="ij")
    every = torch.stack([grid.flatten() for grid in grids], -1)
    wrong = target - every * scale
    return ((wrong @ gram) * wrong).sum(-1).min()


def test_gptq_and_descent_come_near_the_best_numbers_of_all():
    ratios = []
    for seed in range(20):
        target, seen = torch.randn(1, 4, generator=generator(seed)), curvature(4, seed)
        scales = search(target, Grid("int4"), torch.float32)
        steps = gptq(target, seen, Grid("int4"), scales)
        after = descend(target, seen, Grid("int4"), scales, steps, 10)
        least = exhaustive(target, seen.gram, scales.scale, -8, 7)
        found = layer_loss(target, seen.gram, after, scales)
        assert found <= layer_loss(target, seen.gram, steps, scales) * (1 + 1e-4)
        assert found >= least * (1 - 1e-3)
        ratios.append(float(found / least))
    assert sorted(ratios)[10] < 1.1


def test_gptq_without_damping_is_successive_least_squares():
    """Column by column: the rest is refitted to the error so far by solving for it outright."""
    target, seen = torch.randn(3, 12, generator=generator(3)), curvature(12, 3)
    grid = Grid("int4", 4)
    scales = search(target, grid, torch.float32, shrinks=(1.0,))
    steps = gptq(target, Curvature(seen.gram, damping=0.0), grid, scales)
    gram, left, scale = seen.gram.double(), target.double().clone(), scales.scale.repeat_interleave(4, 1).double()
    todo = seen.order.tolist()
    expected = torch.zeros(3, 12)
    while todo:
        j = todo.pop(0)
        expected[:, j] = grid.nearest((left[:, j] / scale[:, j]).float())
        wrong = left[:, j] - expected[:, j] * scale[:, j]
        if todo:
            left[:, todo] += wrong[:, None] * torch.linalg.solve(gram[todo][:, todo], gram[todo, j])
    assert torch.equal(steps, expected)


def test_refitted_scales_are_where_the_loss_is_level():
    target, seen = torch.randn(5, 32, generator=generator(0)), curvature(32)
    grid = Grid("int4", 8)
    scales = search(target, grid, torch.float32)
    steps = grid.nearest(target / scales.scale.repeat_interleave(8, 1))
    after = refit(target, seen.moments, steps, scales)
    scale = after.scale.clone().requires_grad_()
    layer_loss(target, seen.moments, steps, after._replace(scale=scale)).sum().backward()
    before = scales.scale.clone().requires_grad_()
    layer_loss(target, seen.moments, steps, scales._replace(scale=before)).sum().backward()
    assert scale.grad.norm() < 0.02 * before.grad.norm()


def test_a_target_makes_up_for_inputs_that_are_not_what_was_meant():
    meant, weight = inputs(32, rows=2000), torch.randn(8, 32, generator=generator(1))
    came = meant + 0.3 * meant[:, torch.randperm(32, generator=generator(2))]
    seen = Curvature(came.T @ came / 2000, meant.T @ came / 2000)
    plain, aimed = ((meant @ weight.T - came @ w.T).norm() for w in (weight, seen.target(weight)))
    assert aimed < 0.3 * plain
    same = Curvature(seen.gram, seen.gram)
    assert torch.allclose(same.target(weight), weight, atol=1e-4)


def test_columns_kept_elsewhere_stay_zero_and_nothing_is_made_up_for_in_them():
    weight, seen = torch.randn(8, 32, generator=generator(1)), curvature(32)
    columns = torch.tensor([3, 17])
    rest = weight.index_fill(1, columns, 0)
    for method in METHODS:
        restored = round_weight(rest, Grid("int4", 16), method, seen.without(columns)).restored()
        assert torch.equal(restored[:, columns], torch.zeros(8, 2)), method


def test_a_table_is_rounded_nearer_to_itself_than_a_matrix_that_is_only_multiplied():
    weight, seen = torch.randn(64, 32, generator=generator(1)), curvature(32)
    own, looked_up = (round_weight(weight, Grid("int3", 32), "best", c).restored() for c in (seen, seen.for_table()))
    assert (looked_up - weight).norm() < 0.9 * (own - weight).norm()


def test_awq_factors_are_larger_where_inputs_are_and_lose_less():
    weight, x = torch.randn(64, 64, generator=generator(1)), inputs(64)
    x[:, :3] *= 100
    seen, grid = Curvature(x.T @ x / len(x)), Grid("int3", 32)
    factors = awq_factors([weight], grid, seen, x.abs().mean(0))
    assert factors[:3].min() > factors[3:].max()
    scaled = Curvature(seen.gram / factors / factors[:, None])
    moved = loss(weight * factors, round_weight(weight * factors, grid, "rtn"), scaled)
    assert moved < 0.7 * loss(weight, round_weight(weight, grid, "rtn"), seen)
    assert torch.equal(awq_factors([weight], grid, seen, torch.ones(64)), torch.ones(64))


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_rounded_as_each_would_be_alone_and_large_weights_as_small_ones(method, monkeypatch):
    weight, seen = torch.randn(3, 6, 32, generator=generator(0)), curvature(32)
    grid = Grid("int4", 16, symmetric=False)
    whole = round_weight(weight, grid, method, seen)
    for expert in range(3):
        alone = round_weight(weight[expert], grid, method, seen)
        assert torch.equal(whole.numbers[expert], alone.numbers)
        assert torch.equal(whole.scale[expert], alone.scale)
    monkeypatch.setattr("slim.compiler.blocks._ELEMENTS", 64)
    monkeypatch.setattr("slim.passes.rounding.methods._NUMBERS_AT_ONCE", 64)
    assert torch.equal(round_weight(weight, grid, method, seen).restored(), whole.restored())
