"""What is kept beside rounded weights."""

import pytest
import torch

from slim.passes.rounding.correct import low_rank_correction, outlier_columns
from slim.passes.rounding.curvature import Curvature


def test_outlier_columns_are_those_of_the_largest_inputs_in_order():
    absmax = torch.tensor([1.0, 9.0, 2.0, 9.0, 50.0])
    assert outlier_columns(absmax, 0.4).tolist() == [1, 4]
    assert outlier_columns(absmax, 0.01).tolist() == [4]
    assert outlier_columns(absmax, 1.0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(6, 24), (24, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_product_of_that_rank_undoes_more_of_the_error(shape, rank):
    """Against Eckart and Young: what is left are the singular values of error times root that do not fit."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(shape, generator=generator)
    x = torch.randn(200, shape[1], generator=generator) * torch.randn(shape[1], generator=generator).exp()
    seen = Curvature(x.T @ x / 200)
    outer, inner = low_rank_correction(error, seen, rank)
    assert outer.shape == (shape[0], rank)
    assert inner.shape == (rank, shape[1])
    left = (error - outer @ inner).double() @ torch.linalg.cholesky(seen.gram.double())
    values = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(seen.gram.double()))
    assert float(left.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-4)


def test_inputs_that_span_less_than_all_directions_are_taken():
    x = torch.randn(3, 24)
    for shape in ((6, 24), (30, 24)):
        error = torch.randn(shape)
        outer, inner = low_rank_correction(error, Curvature(x.T @ x / 3), 4)
        assert ((error - outer @ inner) @ x.T).norm() < 1e-3 * (error @ x.T).norm()


def test_a_rank_beyond_the_smaller_side_undoes_all():
    error = torch.randn(6, 24)
    outer, inner = low_rank_correction(error, Curvature(torch.eye(24)), 9)
    assert outer.shape == (6, 6)
    assert torch.allclose(outer @ inner, error, atol=1e-5)
