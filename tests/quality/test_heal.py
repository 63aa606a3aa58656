"""What healing brings back on a real model, on text it was not trained on."""

import functools

import pytest

import slim
from benchmarks.quality_peers.cases import CASES, Case
from slim.runtime.perplexity import score


@functools.cache
def case() -> Case:
    return CASES["stories260K"]()


@functools.cache
def nats(passes: str) -> float:
    """Per token."""
    compiled = slim.compile(case().model, passes, calibration=case().tensors()[:64], target="eager", verify=False)
    found = score(compiled, case().passages[:40])
    return found.nats / found.tokens


@pytest.mark.parametrize("lossy", ['gqa(2, method="mean")', 'quantize("int3", method="rtn")'])
def test_fifty_steps_bring_back_a_third_of_what_was_lost(lossy: str, shared: object) -> None:
    before = nats("")
    lost, healed = (nats(passes) - before for passes in (lossy, f"{lossy}, heal(50, tokens=512)"))
    assert lost > 0.05
    assert healed < 0.67 * lost
