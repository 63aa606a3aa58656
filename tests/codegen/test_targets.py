"""Choosing a target: known ones, unknown ones, and those that are still to come."""

import logging

import pytest

from slim import codegen, errors
from slim.codegen import build, select


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


def test_without_a_compiler_auto_means_eager_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(build, "compiler", lambda: None)  # what missing() asks
    codegen._warn_of_eager.cache_clear()
    with caplog.at_level(logging.WARNING, logger="slim"):
        assert select("auto").name == "eager"
        assert select("auto").name == "eager"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiler" in caplog.text
    with pytest.raises(errors.TargetUnavailable, match="cpu"):
        select("cpu")
    codegen._warn_of_eager.cache_clear()
