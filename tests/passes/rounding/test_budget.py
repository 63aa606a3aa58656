"""Mixed formats fit into what they are given and lose the least that can be."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim import errors
from slim.compiler.allocation import Option, allocate
from slim.compiler.passes_base import Context
from slim.passes import Quantize
from tests.programs import lifted, program

SITE = st.lists(st.builds(Option, st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=4)


@given(st.lists(SITE, min_size=1, max_size=4), st.integers(1, 40))
def test_an_allocation_fits_and_is_as_good_as_any_but_for_one_step(sites: Any, budget: int) -> None:
    every = [
        (
            sum(s[i].cost for s, i in zip(sites, pick, strict=True)),
            sum(s[i].damage for s, i in zip(sites, pick, strict=True)),
        )
        for pick in itertools.product(*[range(len(site)) for site in sites])
    ]
    fitting = [damage for cost, damage in every if cost <= budget]
    chosen = allocate(sites, budget)
    if chosen is None:
        assert not fitting
        return
    picked = [site[index] for site, index in zip(sites, chosen, strict=True)]
    assert sum(option.cost for option in picked) <= budget
    worst_step = max(max(o.damage for o in site) - min(o.damage for o in site) for site in sites)
    assert sum(option.damage for option in picked) <= min(fitting) + worst_step
    assert allocate(sites, budget) == chosen


def test_bytes_go_where_they_undo_the_most() -> None:
    options = [[Option(3, 9.0), Option(4, 1.0), Option(8, 0.0)], [Option(3, 2.0), Option(4, 1.5), Option(8, 0.0)]]
    assert allocate(options, 5.9) is None
    assert [allocate(options, budget) for budget in (6, 7, 12, 16)] == [[0, 0], [1, 0], [1, 2], [2, 2]]


def test_a_model_takes_the_bytes_it_was_given_and_the_report_says_how() -> None:
    sizes = {}
    for bits in ("int8", "int3"):
        after = lifted("llama").copy()
        Quantize(bits).run(after, Context())
        after.clean()
        sizes[bits] = after.nbytes
    budget = (sizes["int8"] + sizes["int3"]) // 2
    mixed = lifted("llama").copy()
    report = Quantize(budget=budget).run(mixed, Context(calibration=[torch.randint(3, 96, (4, 24))]))
    mixed.clean()
    assert 0.85 * budget < mixed.nbytes <= budget
    assert any("formats for" in note and "int8" in note for note in report.notes)


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can() -> None:
    before = program(
        "y = aten.linear.default(x, weights['w'])\nreturn (y,)", {"w": torch.randn(6, 32)}, inputs="x: f32[B, S, 32]"
    )
    with pytest.raises(errors.BadPassOption, match="at the least"):
        Quantize(budget=50).run(before, Context(calibration=[torch.randn(1, 4, 32)]))
