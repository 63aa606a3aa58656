"""Weights are read when they are asked for, one at a time; parts of fused ones can be put back."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from slim import errors
from slim.compiler.weights import Part, PartOf, Stored, Weights, check_finite
from tests.programs import Counted, program

FAST = settings(max_examples=100, deadline=None)


# -- parts of a fused weight -------------------------------------------------------------------------------------------


@st.composite
def parts(draw):
    """(base, every part of one cut along one axis of the grid): they tile the base."""
    grid = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    axis = draw(st.integers(0, len(grid) - 1))
    cuts = sorted({0, grid[axis], *draw(st.lists(st.integers(0, grid[axis]), max_size=2))})
    merged = draw(st.integers(1, len(grid) - 1))  # the grid's leading axes are the rows of the base
    shape = (math.prod(grid[:merged]), math.prod(grid[merged:]))
    transposed = draw(st.booleans())
    made = []
    for start, stop in itertools.pairwise(cuts):
        index = tuple((start, stop) if i == axis else (0, n) for i, n in enumerate(grid))
        sizes = [b - a for a, b in index]
        part_shape = (math.prod(sizes[:merged]), math.prod(sizes[merged:]))
        made.append(Part("base", grid, index, part_shape, transposed))
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))), made


@FAST
@given(parts())
def test_putting_back_every_part_rebuilds_the_whole(case):
    base, cut = case
    rebuilt = torch.full_like(base, math.nan)
    for part in cut:
        part.put(rebuilt, part.take(base))
    assert torch.equal(rebuilt, base)


@FAST
@given(parts(), st.data())
def test_what_is_put_is_what_is_taken_and_nothing_else_changes(case, data):
    base, cut = case
    chosen = data.draw(st.sampled_from(cut))
    new, changed = torch.randn(chosen.taken_shape), base.clone()
    chosen.put(changed, new)
    assert torch.equal(chosen.take(changed), new)
    for other in cut:
        if other is not chosen:
            assert torch.equal(other.take(changed), other.take(base))


@FAST
@given(parts())
def test_a_part_knows_its_shape_before_it_is_taken(case):
    base, cut = case
    for part in cut:
        assert part.take(base).shape == part.taken_shape == PartOf(base, part).shape


def test_heads_interleaved_in_a_fused_qkv_are_parts():
    """GPT-NeoX keeps q, k and v of each head side by side: [heads, 3, width]."""
    heads, width, hidden = 3, 4, 12
    fused = torch.arange(heads * 3 * width * hidden).float().reshape(heads * 3 * width, hidden)
    k = Part("qkv", (heads, 3, width, hidden), ((0, heads), (1, 2), (0, width), (0, hidden)), (heads * width, hidden))
    assert torch.equal(k.take(fused), fused.view(heads, 3, width, hidden)[:, 1].reshape(heads * width, hidden))


def test_a_part_of_a_weight_on_disk_reads_it_and_keeps_only_the_part():
    on_disk = Counted(torch.randn(6, 4))
    part = PartOf(on_disk, Part("w", (3, 2, 4), ((1, 2), (0, 2), (0, 4)), (2, 4)))
    assert (on_disk.reads, part.shape, part.dtype) == (0, (2, 4), torch.float32)
    assert torch.equal(part.load(), on_disk._tensor[2:4])
    assert part.load().untyped_storage().nbytes() == 2 * 4 * 4
    assert on_disk.reads == 2


def test_a_part_of_a_tensor_in_memory_shares_it():
    base = torch.randn(6, 4)
    part = PartOf(base, Part("w", (3, 2, 4), ((1, 2), (0, 2), (0, 4)), (2, 4))).load()
    assert part.data_ptr() == base[2:].data_ptr()


# -- reading, or not ---------------------------------------------------------------------------------------------------


def deferred(**shapes):
    return Weights({name: Counted(torch.randn(*shape)) for name, shape in shapes.items()})


def test_asking_about_weights_reads_none_of_them():
    weights = deferred(a=(3, 4), b=(5,))
    assert list(weights) == ["a", "b"]
    assert len(weights) == 2
    assert "a" in weights
    assert "c" not in weights
    assert weights.shape("a") == (3, 4)
    assert weights.dtype("a") == torch.float32
    assert weights.numel("a") == 12
    assert weights.nbytes("b") == 20
    assert weights.is_deferred("a")
    weights.copy()
    del weights["b"]
    assert all(weights.raw(name).reads == 0 for name in weights)


def test_a_deferred_weight_is_read_each_time_and_not_kept():
    weights = deferred(a=(3, 4))
    assert torch.equal(weights["a"], weights["a"])
    assert weights.raw("a").reads == 2
    assert weights.is_deferred("a")


def test_materialise_reads_each_weight_once_and_keeps_it():
    weights = deferred(a=(3, 4), b=(5,))
    on_disk = {name: weights.raw(name) for name in weights}
    weights.materialise()
    weights.materialise()
    assert [on_disk[name].reads for name in on_disk] == [1, 1]
    assert weights["a"] is weights["a"]
    assert not weights.is_deferred("a")


def test_a_copy_is_another_mapping_over_the_same_tensors():
    weights = Weights({"a": torch.ones(2), "b": torch.ones(3)})
    other = weights.copy()
    assert other["a"] is weights["a"]
    other["a"] = torch.zeros(2)
    del other["b"]
    assert torch.equal(weights["a"], torch.ones(2))
    assert "b" in weights


def chain(links, width=8):
    lines = "\n".join(f'v{i + 1} = aten.linear.default(v{i}, weights["w.{i}"])' for i in range(links))
    weights = {f"w.{i}": Counted(torch.randn(width, width) / 3) for i in range(links)}
    return program(f"{lines.replace('(v0', '(x')}\nreturn (v{links},)", weights)


def test_running_a_program_holds_one_weight_at_a_time():
    made = chain(6)
    Counted.reset()
    made.run(torch.randn(1, 2, 8))
    assert Counted.most == 1
    assert Counted.alive == 0
    assert all(made.weights.raw(name).reads == 1 for name in made.weights)


def test_building_copying_verifying_and_printing_a_program_reads_no_weight():
    from slim.compiler.verify import verify

    made = chain(3)
    verify(made.copy(), "copy")
    str(made)
    made.infer()
    assert made.parameters == 3 * 64
    assert made.nbytes == 3 * 256
    assert all(made.weights.raw(name).reads == 0 for name in made.weights)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    return path


def test_a_stored_weight_reads_what_was_saved(file):
    stored = Stored(file, "a", torch.float32, (3, 4))
    assert torch.equal(stored.load(), torch.arange(12.0).reshape(3, 4))
    assert Stored(file, "b", torch.float32, (2,)).load().dtype == torch.float32  # read as another type


def test_what_was_read_outlives_the_file(file):
    tensor = Stored(file, "a", torch.float32, (3, 4)).load()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(tensor, torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "noise", "other"])
def test_a_file_that_changed_under_us_is_slims_own_error(file, damage):
    whole = file.read_bytes()
    stored = Stored(file, "a", torch.float32, (3, 4))
    if damage == "gone":
        file.unlink()
    elif damage == "other":
        save_file({"c": torch.ones(1)}, file)
    else:
        file.write_bytes({"cut": whole[:-8], "empty": b"", "noise": b"\xff" * len(whole)}[damage])
    with pytest.raises(errors.CheckpointCorrupt) as caught:
        stored.load()
    assert str(file) in str(caught.value)
    assert ": a: " in str(caught.value).replace("'", "") or "a:" in str(caught.value)


# -- NaN and infinity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinite"), (-math.inf, "infinite")])
def test_a_weight_that_is_not_finite_is_refused_by_name_with_how_many(dtype, value, kind):
    bad = torch.randn(5, 7).to(dtype)
    bad[1, 2] = bad[4, 6] = value
    with pytest.raises(errors.NonFiniteWeight) as caught:
        Weights({"layers.3.w": bad})["layers.3.w"]
    assert (caught.value.name, caught.value.kind, caught.value.count) == ("layers.3.w", kind, 2)


def test_a_deferred_weight_is_checked_when_it_is_read():
    weights = Weights({"w": Counted(torch.tensor([1.0, math.nan]))})
    with pytest.raises(errors.NonFiniteWeight):
        weights["w"]
    with pytest.raises(errors.NonFiniteWeight):
        weights.materialise()


def test_a_buffer_may_mask_by_infinity_and_a_parameter_may_not():
    mask, lines = torch.tensor([0.0] + [-math.inf] * 7), "y = aten.add.Tensor(x, weights['m'])\nreturn (y,)"
    made = program(lines, {"m": mask}, constants={"m"})
    assert made.copy().run(torch.ones(1, 1, 8))[0][0, 0].tolist() == [1.0] + [-math.inf] * 7
    with pytest.raises(errors.NonFiniteWeight):
        program(lines, {"m": mask}).run(torch.ones(1, 1, 8))
    with pytest.raises(errors.NonFiniteWeight):
        program(lines, {"m": mask + math.nan}, constants={"m"}).run(torch.ones(1, 1, 8))


def test_a_replaced_weight_is_checked_again():
    weights = Weights({"w": torch.ones(2)})
    weights["w"]
    weights["w"] = torch.tensor([1.0, math.inf])
    with pytest.raises(errors.NonFiniteWeight):
        weights["w"]


def test_running_over_a_weight_that_is_not_finite_is_refused():
    made = program("y = aten.add.Tensor(x, weights['w'])\nreturn (y,)", {"w": torch.full((8,), math.nan)})
    with pytest.raises(errors.NonFiniteWeight):
        made.run(torch.ones(1, 1, 8))
    with pytest.raises(errors.NonFiniteWeight):
        made.module()


@pytest.mark.parametrize(
    "fine", [torch.tensor([1, 2]), torch.tensor([True]), torch.empty(0), torch.tensor(3.0), torch.tensor([3e38, -3e38])]
)
def test_whole_numbers_nothing_and_large_numbers_are_fine(fine):
    check_finite("w", fine)
    assert torch.equal(Weights({"w": fine})["w"], fine)


def test_a_weight_is_searched_once():
    weights = Weights({"w": torch.ones(2)})
    first = weights["w"]
    first[0] = math.nan  # what is written later into a tensor that was handed out is the writer's affair
    assert weights["w"] is first
