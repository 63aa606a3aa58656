"""Views with symbolic sizes move indices as torch's own views do."""

import itertools

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim.codegen.regions.views import Buffer, View, divided, same

S = sympy.Symbol("S", integer=True, positive=True)


def buffer(*shape: int) -> View:
    return Buffer("temp", "x", torch.float32, shape).view()


def as_torch(view: View, data: torch.Tensor) -> torch.Tensor:
    return data.reshape(-1).as_strided([int(s) for s in view.shape], [int(s) for s in view.strides], int(view.offset))


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SHAPES, st.randoms(use_true_random=False))
def test_a_reshape_is_a_view_exactly_where_torch_has_one(shape, random):
    data = torch.arange(torch.Size(shape).numel()).float()
    order = list(range(len(shape)))
    random.shuffle(order)
    view = buffer(*shape).permute(order)
    tensor = data.reshape(shape).permute(order)
    for new in set(itertools.permutations([*tensor.shape, 1])) | {(tensor.numel(),)}:
        moved = view.reshape(new)
        try:
            wanted = tensor.view(new)
        except RuntimeError:
            wanted = None
        if moved is not None:
            assert torch.equal(as_torch(moved, data), tensor.reshape(new))
        else:
            assert wanted is None or tensor.numel() == 1


def test_sizes_are_compared_for_all_values():
    assert same(S * 4 + 4, 4 * (S + 1))
    assert not same(S, S + 1)
    assert divided(S * 12, 4) == 3 * S
    assert divided(S, 4) is None


def test_heads_split_and_join_with_a_symbolic_length():
    view = Buffer("temp", "x", torch.float32, (2, S, 12)).view()
    heads = view.reshape((2, S, 3, 4)).permute((0, 2, 1, 3))
    assert heads.strides == (12 * S, 4, 12, 1)
    assert heads.reshape((2, S, 12)) is None
    assert heads.permute((0, 2, 1, 3)).reshape((2 * S, 12)).strides == (12, 1)
