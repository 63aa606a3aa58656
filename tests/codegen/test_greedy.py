"""Greedy decoding inside generated code writes what the loop in Python writes."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import slim
from slim.codegen import Ends, build
from slim.runtime.compiled import CompiledModel
from slim.runtime.steps import CachedDecoder
from tests.compiled import pair, prompt

BOTH = [
    pytest.param("cpu", marks=pytest.mark.skipif(build.missing() is not None, reason=f"no C++: {build.missing()}")),
    pytest.param("cuda", marks=pytest.mark.gpu),  # by the interpreter it would take minutes: triton/test_decoding.py
]

PAD = 98  # no row of the tests' model writes it


class _Nothing(LogitsProcessor):
    """Leaves scores alone; that there is a processor keeps the loop in Python."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class _Heard:
    """A streamer."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.fixture(scope="module", params=BOTH)
def model(request: pytest.FixtureRequest) -> CompiledModel:
    return CompiledModel(pair("llama")[1].program, request.param)


def both(model: CompiledModel, **options) -> Tensor:
    """What both loops write, once it is the same."""
    tokens, mask = prompt()
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": PAD, **options}
    inside = model.generate(tokens, **options)
    outside = model.generate(tokens, logits_processor=LogitsProcessorList([_Nothing()]), **options)
    assert torch.equal(inside, outside)
    return inside


def test_the_loop_runs_inside_unless_something_looks_at_scores(model: CompiledModel, monkeypatch: pytest.MonkeyPatch):
    steps = []
    step = CachedDecoder.step
    monkeypatch.setattr(CachedDecoder, "step", lambda self, tokens: steps.append(1) or step(self, tokens))
    tokens, mask = prompt()
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    model.generate(tokens, **options)
    assert not steps
    model.generate(tokens, logits_processor=LogitsProcessorList([_Nothing()]), **options)
    assert len(steps) == 4  # the first token is prefill's


@pytest.mark.parametrize("new", [1, 2, 17, 40])
def test_any_number_of_tokens(model: CompiledModel, new: int):
    length = prompt()[0].shape[1]
    assert both(model, max_new_tokens=new, eos_token_id=None).shape[1] == length + new


def test_rows_end_one_by_one_and_go_on_with_padding(model: CompiledModel):
    length = prompt()[0].shape[1]
    free = both(model, max_new_tokens=24, eos_token_id=None)[:, length:]
    ends = [int(row[index]) for row, index in zip(free, (3, 11, 19), strict=False)]
    written = both(model, max_new_tokens=24, eos_token_id=ends)[:, length:]
    for row in written.tolist():
        first = min(row.index(end) for end in ends if end in row)
        assert set(row[first + 1 :]) <= {PAD}, "only padding comes after an end"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_end_tokens_may_come_as_a_tensor_of_any_integers(model: CompiledModel, dtype: torch.dtype):
    length = prompt()[0].shape[1]
    end = int(both(model, max_new_tokens=24, eos_token_id=None)[0, length + 5])
    both(model, max_new_tokens=24, eos_token_id=torch.tensor([end], dtype=dtype))


def test_one_row_stops_at_its_end(model: CompiledModel):
    tokens = prompt(padded=False)[0][:1]
    options = {"max_new_tokens": 20, "do_sample": False}
    free = model.generate(tokens, **options, eos_token_id=None)[0, tokens.shape[1] :].tolist()
    written = model.generate(tokens, **options, eos_token_id=free[7])[0, tokens.shape[1] :].tolist()
    assert written == free[: free.index(free[7]) + 1]


@pytest.mark.parametrize("target", BOTH)
def test_a_model_without_positions_decodes_inside(target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CachedDecoder, "step", None)
    compiled = CompiledModel(pair("bloom")[1].program, target)
    tokens, mask = prompt()
    assert "position_ids" not in compiled.step(masked=True, last_only=True).names
    compiled.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)


def test_a_step_with_parts_that_pytorch_runs_is_no_loop(model: CompiledModel, monkeypatch: pytest.MonkeyPatch):
    step = model.step(masked=True, last_only=True)
    tokens, mask = prompt()
    decoder = CachedDecoder(step, model.new_cache(tokens.shape[0], 64))
    last = decoder.prefill(tokens, mask, (mask.cumsum(-1) - 1).clamp(min=0)).argmax(-1)
    monkeypatch.setattr(type(step.executable.schedule), "foreign", property(lambda schedule: schedule.regions[:1]))
    ends = Ends(torch.empty(0, dtype=torch.int64), torch.zeros(tokens.shape[0], dtype=torch.bool), 0)
    assert decoder.greedy(last, 3, ends) is None


def test_a_cache_grows_on_the_way(model: CompiledModel):
    tokens, mask = prompt()
    want = model.generate(tokens, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None)
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + 2)
    got = model.generate(tokens, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None,
                         past_key_values=cache)  # fmt: skip
    assert torch.equal(got, want)
    assert cache.length == want.shape[1] - 1


def test_a_streamer_hears_every_token(model: CompiledModel):
    tokens = prompt(padded=False)[0][:1]
    heard = _Heard()
    written = model.generate(tokens, max_new_tokens=9, do_sample=False, eos_token_id=None, streamer=heard)
    assert heard.tokens == [tokens[0].tolist(), *([token] for token in written[0, tokens.shape[1] :].tolist())]
    assert heard.ended


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_equal_scores_the_first_wins(dtype: torch.dtype, target: str):
    """Scores of 16 bits are often equal."""
    model = copy.deepcopy(pair("llama")[0]).to(dtype)
    both(slim.compile(model, target=target, verify=False), max_new_tokens=20, eos_token_id=None)


def test_steps_and_loops_mix(model: CompiledModel):
    """A decoder keeps its place, whoever moves it."""
    tokens, mask = prompt()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def decoder() -> tuple[CachedDecoder, Tensor]:
        made = CachedDecoder(model.step(masked=True, last_only=True), model.new_cache(tokens.shape[0], 64))
        return made, made.prefill(tokens, mask, positions).argmax(-1)

    ends = Ends(torch.empty(0, dtype=torch.int64), torch.zeros(tokens.shape[0], dtype=torch.bool), 0)
    stepping, last = decoder()
    wanted = []
    for _ in range(6):
        last = stepping.step(last).argmax(-1)
        wanted.append(last)
    mixing, last = decoder()
    first = mixing.greedy(last, 2, ends)
    third = mixing.step(first[-1]).argmax(-1)
    rest = mixing.greedy(third, 3, ends)
    assert torch.equal(torch.stack(wanted), torch.cat([first, third[None], rest]))
