"""Greedy decoding on the device: a burst of steps says what single steps say, and rows end where they should."""

import pytest
import torch
from torch import Tensor

import slim
from slim.codegen import Ends
from slim.runtime.compiled import CompiledModel
from slim.runtime.steps import CachedDecoder
from tests import programs

TOKENS = torch.tensor([[0, 17, 5], [44, 71, 8]])
MASK = (TOKENS != 0).long()
PAD = 95  # no row of the tests' model writes it


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return slim.compile(programs.model("qwen2"), target="cuda", verify=False)


@pytest.fixture
def start(model: CompiledModel) -> tuple[CachedDecoder, Tensor]:
    """A decoder that has read the prompt, and the tokens that follow."""
    decoder = CachedDecoder(model.step(masked=True, last_only=True), model.new_cache(2, 16))
    tokens, mask = TOKENS.to(model.device), MASK.to(model.device)
    return decoder, decoder.prefill(tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)).argmax(-1)


def ends(model: CompiledModel, *tokens: int) -> Ends:
    finished = torch.zeros(2, dtype=torch.bool, device=model.device)
    return Ends(torch.tensor(tokens, dtype=torch.int64, device=model.device), finished, PAD)


@pytest.fixture(scope="module")
def free(model: CompiledModel) -> Tensor:
    """What single steps write, [5, 2]."""
    decoder = CachedDecoder(model.step(masked=True, last_only=True), model.new_cache(2, 16))
    tokens, mask = TOKENS.to(model.device), MASK.to(model.device)
    last = decoder.prefill(tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)).argmax(-1)
    written = []
    for _ in range(5):
        last = decoder.step(last).argmax(-1)
        written.append(last)
    return torch.stack(written)


def test_a_burst_writes_what_single_steps_do_and_both_go_on_from_the_other(model, start, free):
    decoder, last = start
    first = decoder.greedy(last, 2, ends(model))
    assert torch.equal(first, free[:2])
    assert decoder.cache.length == TOKENS.shape[1] + 2
    third = decoder.step(first[-1]).argmax(-1)
    assert torch.equal(third, free[2])
    assert torch.equal(decoder.greedy(third, 2, ends(model)), free[3:])


def test_a_row_that_ended_goes_on_with_padding(model, start, free):
    decoder, last = start
    written = decoder.greedy(last, 3, ends(model, int(free[0, 0])))
    assert written[:, 0].tolist() == [int(free[0, 0]), PAD, PAD]


def test_no_step_is_counted_after_all_rows_have_ended(model, start, free):
    decoder, last = start
    some = ends(model, *free[0].tolist(), *free[1].tolist())
    written = decoder.greedy(last, 5, some)
    assert len(written) <= 2
    assert bool(some.finished.all())
    assert decoder.cache.length == TOKENS.shape[1] + len(written)


def test_a_cache_grows_on_the_way(model, free):
    tokens, mask = TOKENS.to(model.device), MASK.to(model.device)
    options = {"attention_mask": mask, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    cache = model.new_cache(2, 4)
    written = model.generate(tokens, max_new_tokens=4, past_key_values=cache, **options)
    assert torch.equal(written[:, -3:].T, free[:3])
