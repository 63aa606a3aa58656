"""Programs as Triton kernels: how many a layer takes, what memory they share, what calls check."""

from functools import cache

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

import slim
from slim import errors
from slim.codegen.regions.views import Buffer
from slim.codegen.triton.launching import Launch
from slim.codegen.triton.memory import Arena
from slim.runtime.compiled import CompiledModel
from tests import programs


@cache
def llama(layers: int, passes: str = "") -> CompiledModel:
    return slim.compile(programs.model("llama", num_hidden_layers=layers), passes, target="cuda", verify=False)


def decode_call(layers: int, batch: int = 1, passes: str = ""):
    """A decoding step of a Llama block, bound to its cache."""
    compiled = llama(layers, passes)
    step = compiled.step(masked=False, last_only=True)
    cache = compiled.new_cache(batch, 16)
    tokens = torch.ones(batch, 1, dtype=torch.int64, device=compiled.device)
    inputs = {"input_ids": tokens, "position_ids": tokens + 3}
    return step.executable.bind(*step.arguments(cache, cache.prepare(4), inputs))


@pytest.mark.parametrize(("batch", "passes"), [(1, ""), (8, ""), (1, 'quantize("int8", activations="int8")')])
def test_a_layer_decodes_in_five_kernels(batch: int, passes: str):
    few, more = (decode_call(layers, batch, passes).steps for layers in (1, 3))
    assert all(isinstance(step, Launch) for step in more)
    assert len(more) - len(few) == 2 * 5


def test_layers_share_their_kernels():
    few, more = (decode_call(layers).executable for layers in (1, 3))
    assert len(few.code) == len(more.code)
    assert any("more like it" in source for source in more.code.values())


def test_a_kernel_says_what_it_is_and_where_in_the_model_it_comes_from():
    code = llama(1).code
    source = next(text for name, text in code.items() if "linear_one_row" in name)
    head = source.partition("import triton")[0]
    assert "gate_proj" in source or "q_proj" in source
    assert ".py:" in head
    compile(source, "generated", "exec")


def test_a_longer_context_changes_nothing_but_a_number_in_memory():
    call = decode_call(1)
    index = len(call.inputs) - 3
    mask = torch.ones(1, 16, dtype=torch.bool)
    call.set(index, mask[:, :5])
    steps = call.steps
    call()
    call.set(index, mask[:, :9])
    assert call.steps is steps
    assert int(call.live[0]) == 9


def test_inputs_are_checked():
    call = decode_call(1)
    with pytest.raises(errors.BadInput, match="input_ids"):
        call.executable.bind(torch.ones(1, 1, dtype=torch.int32), *call.inputs[1:])
    with pytest.raises(errors.BadInput, match="shape"):
        call.executable.bind(*call.inputs[:-1], call.inputs[-1][:, :1])
    with pytest.raises(errors.BadInput, match="contiguous"):
        call.executable.bind(*call.inputs[:-1], call.inputs[-1].mT.contiguous().mT)


B = sympy.Symbol("B", integer=True, positive=True)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9)), max_size=12), st.integers(1, 5))
def test_buffers_that_are_alive_together_never_overlap(wanted: list[tuple[int, int, int]], batch: int):
    spans = [(Buffer("temp", str(i), torch.float32, (B, n)), *sorted((a, b))) for i, (n, a, b) in enumerate(wanted)]
    uses = [[buffer for buffer, first, last in spans if step in (first, last)] for step in range(10)]
    arena = Arena(uses, lambda size: size if isinstance(size, int) else batch)
    tensors = arena.allocate(torch.device("cpu"))
    for one, first, last in spans:
        assert tuple(tensors[one].shape) == (batch, one.shape[1])
        for other, begin, end in spans:
            if one is not other and first <= end and begin <= last:
                a, b = tensors[one], tensors[other]
                assert a.data_ptr() + a.nbytes <= b.data_ptr() or b.data_ptr() + b.nbytes <= a.data_ptr()
