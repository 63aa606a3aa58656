"""Choosing a target: known ones, unknown ones, and those that are still to come."""

import pytest

from slim import codegen, errors


def test_auto_is_a_target_of_this_machine():
    assert codegen.select("auto").missing() is None


def test_eager_is_everywhere():
    assert codegen.select("eager").name == "eager"


@pytest.mark.parametrize("name", ["toaster", "cuda:fast", "eager:sm_90", ""])
def test_an_unknown_target_is_refused_with_the_known_ones(name):
    with pytest.raises(errors.UnknownTarget, match="auto, cuda, cpu, eager"):
        codegen.select(name)


@pytest.mark.parametrize("name", [n for n, t in codegen.TARGETS.items() if t.missing()])
def test_a_target_that_cannot_be_used_says_why(name):
    with pytest.raises(errors.TargetUnavailable, match=codegen.TARGETS[name].missing()):
        codegen.select(name)
