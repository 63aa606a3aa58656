"""Choosing a target: known ones, unknown ones, and those that are still to come."""

import importlib.util
import logging

import pytest
import torch

from slim import codegen, errors
from slim.codegen import build, select
from slim.codegen.triton import device, interpreter
from slim.runtime.compiled import CompiledModel
from tests.compiled import pair


def test_auto_is_a_target_of_this_machine():
    assert codegen.select("auto").missing() is None


def test_eager_is_everywhere():
    assert codegen.select("eager").name == "eager"


@pytest.mark.parametrize("name", ["toaster", "cuda:fast", "eager:sm_90", ""])
def test_an_unknown_target_is_refused_with_the_known_ones(name):
    with pytest.raises(errors.UnknownTarget, match="auto, cuda, cpu, eager"):
        codegen.select(name)


def test_without_a_gpu_cuda_says_what_else_there_is(monkeypatch):
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(errors.TargetUnavailable, match=r"no GPU.*cuda:sm_90.*TRITON_INTERPRET"):
        select("cuda")


def test_without_triton_cuda_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("cuda", "cuda:sm_90"):
        with pytest.raises(errors.TargetUnavailable, match=r"pip install 'slim-compiler\[cuda\]'"):
            select(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which auto takes")
def test_auto_never_means_the_interpreter():
    assert select("auto").name != "cuda"


@pytest.mark.parametrize("target", ["cpu", "eager", "cuda:sm_90"])
def test_there_is_nothing_to_tune_without_a_gpu(target):
    with pytest.raises(errors.BadInput, match="tune"):
        select(target, tune=1.0)


def test_what_was_compiled_for_elsewhere_says_so_when_it_is_called(monkeypatch):
    monkeypatch.setattr(interpreter, "interpreting", lambda: True)
    with pytest.raises(errors.TargetUnavailable, match="interpret"):
        CompiledModel(pair("llama")[1].program, "cuda:sm_90")


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
