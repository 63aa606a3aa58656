"""What lower ranks cost on real models, beside SVD-LLM at equal stored numbers; nothing is trained."""

import functools

import pytest

import slim
from benchmarks.quality_peers.cases import CASES, Case
from slim.passes import LowRank
from slim.runtime.perplexity import score

SEQUENCES, SCORED = 16, {"demo": 6, "babyllama361": 30}

pytestmark = pytest.mark.slow


@functools.cache
def case(name: str) -> Case:
    return CASES[name]()


@functools.cache
def nats(name: str, *passes: LowRank) -> float:
    """Per token, on less text than benchmarks/low_rank.py reads."""
    calibration = case(name).tensors()[:SEQUENCES]
    compiled = slim.compile(case(name).model, passes, calibration=calibration, target="eager", verify=False)
    found = score(compiled, case(name).passages[: SCORED[name]])
    return found.nats / found.tokens


@pytest.mark.parametrize(("name", "keep", "of_published"), [("demo", 0.8, 1 / 4), ("babyllama361", 0.6, 1 / 2)])
def test_a_lower_rank_costs_a_fraction_of_what_it_does_as_published(
    name: str, keep: float, of_published: float, request: pytest.FixtureRequest
) -> None:
    if name != "demo":
        request.getfixturevalue("shared")
    before = nats(name)
    ours, published = (nats(name, LowRank(keep, method)) - before for method in ("whitened", "svd_llm"))
    assert ours < of_published * published
