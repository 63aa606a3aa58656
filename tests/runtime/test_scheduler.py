"""Continuous batching: whatever comes, goes, forks or is cancelled, each request gets the tokens it gets alone."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from slim import KVCacheConfig, Sampling, Scheduler, errors
from slim.compiler.passes_base import Context
from slim.passes import SparseAttention
from slim.runtime.compiled import CompiledModel
from slim.runtime.pages import PAGE
from slim.runtime.request import Request
from slim.runtime.sampling import Sampler, drawn
from tests.compiled import pair

EOS = 7


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return CompiledModel(pair("llama")[1].program.copy(), "auto", kv_cache=KVCacheConfig(layout="paged"))


class Letters:
    """A letter a token, as a tokenizer."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def decode(self, tokens: list[int], **_: Any) -> str:
        if self.fails_at is not None and len(tokens) >= self.fails_at:
            raise RuntimeError("no such letter")
        return "".join(chr(0x4E00 + token) for token in tokens)


def alone(model: CompiledModel, prompt: list[int], limit: int) -> list[int]:
    tokens = torch.tensor([prompt])
    options = dict(do_sample=False, eos_token_id=EOS, pad_token_id=0)
    return model.generate(tokens, max_new_tokens=limit, **options)[0, len(prompt) :].tolist()


def make_prompt(rng: random.Random, longest: int) -> list[int]:
    shared = [rng.randrange(3, 60)] * (PAGE * rng.choice([0, 0, 1, 2]))  # so that some begin alike
    return (shared + [rng.randrange(8, 60) for _ in range(rng.randint(1, longest))])[:longest]


def test_requests_get_what_they_get_alone(model: CompiledModel) -> None:
    rng = random.Random(0)
    prompts = [make_prompt(rng, 100) for _ in range(12)]
    scheduler = Scheduler(model, max_tokens=2048, max_batch=5, chunk=32, eos_token_id=EOS)
    requests = [scheduler.submit(prompt, 1 + 3 * index) for index, prompt in enumerate(prompts)]
    scheduler.run()
    assert [r.tokens for r in requests] == [alone(model, r.prompt, r.limit) for r in requests]
    assert all(request.state == "finished" for request in requests)


def test_who_runs_out_of_pages_is_computed_again_and_says_the_same(model: CompiledModel) -> None:
    rng = random.Random(1)
    scheduler = Scheduler(model, max_tokens=4 * PAGE, max_batch=4, chunk=40, eos_token_id=EOS, share_prefixes=False)
    requests = [scheduler.submit([rng.randrange(8, 60) for _ in range(50)], 60) for _ in range(4)]
    scheduler.run()
    assert sum(request.preempted for request in requests) > 0
    assert [r.tokens for r in requests] == [alone(model, r.prompt, 60) for r in requests]


def test_what_keeps_other_keys_of_a_prompt_in_pieces_is_refused() -> None:
    program = pair("llama")[1].program.copy()
    SparseAttention("vertical_slash", columns=4, slashes=4).run(program, Context())
    voting = CompiledModel(program, "eager", kv_cache=KVCacheConfig(layout="paged"))
    with pytest.raises(errors.CacheUnsupported, match="vertical_slash keeps"):
        Scheduler(voting)


def test_requests_of_another_scheduler_and_ends_that_are_no_tokens_are_refused(model: CompiledModel) -> None:
    mine, other = (Scheduler(model, max_tokens=2048, eos_token_id=[]) for _ in range(2))
    request = mine.submit([9, 10], 20)
    mine.advance()
    for act in (other.cancel, other.fork):
        for given in (request, None):
            with pytest.raises(errors.BadInput, match="is no request of this scheduler"):
                act(given)  # type: ignore[arg-type]
    assert len(request.result()) == 20
    for end in ("x", [[1]], 3.5, True, -1, 10**6):
        with pytest.raises(errors.BadInput, match="is no token"):
            Scheduler(model, eos_token_id=end)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"share_prefixes": "no"}, {"tokenizer": 5}, {"chunk": 0}], ids=str)
def test_options_of_the_wrong_kind_are_refused(model: CompiledModel, option: dict[str, Any]) -> None:
    with pytest.raises(errors.BadInput, match=next(iter(option))):
        Scheduler(model, **option)


@pytest.mark.parametrize("sizes", [("a",), (0,), (1, -1), (True,)])
def test_a_cache_of_no_size_is_refused(model: CompiledModel, sizes: tuple[Any, ...]) -> None:
    with pytest.raises(errors.BadInput, match="is no number from"):
        model.new_cache(*sizes)


def test_a_shared_prompt_is_run_once(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=4096, eos_token_id=EOS)
    common = [random.Random(2).randrange(8, 60) for _ in range(3 * PAGE)]
    first = scheduler.submit([*common, 9], 3)
    scheduler.run()
    second = scheduler.submit([*common, 11, 12], 3)
    scheduler.run()
    assert scheduler.prefixes is not None
    assert scheduler.prefixes.hits == 3 * PAGE
    assert [r.tokens for r in (first, second)] == [alone(model, r.prompt, 3) for r in (first, second)]


def test_tokens_come_one_by_one_while_others_go_on(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=2048, eos_token_id=[])
    slow, fast = scheduler.submit([9, 10], 40), scheduler.submit([11], 3)
    stream = iter(slow)
    assert next(stream) == slow.tokens[0]
    assert not slow.done
    assert fast.result() == fast.tokens
    assert len([slow.tokens[0], *stream]) == 40


def test_first_come_is_first_served_and_nobody_starves(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=6 * PAGE, max_batch=2, eos_token_id=[])
    large = scheduler.submit(list(range(8, 58)) * 5, 4)  # the pool's size, nearly
    small = [scheduler.submit([9 + n], 4) for n in range(6)]
    order: list[Request] = []
    while scheduler.advance():
        order += [r for r in (large, *small) if r.done and r not in order]
    assert order[0] in (large, small[0])
    assert order.index(large) <= 1
    assert [r for r in order if r is not large] == small


PROMPTS = [make_prompt(random.Random(seed), 90) for seed in range(24)]


def test_a_thousand_random_schedules_leak_nothing_and_change_nobody_s_tokens(model: CompiledModel) -> None:
    known = {(n, limit): alone(model, PROMPTS[n], limit) for n in range(len(PROMPTS)) for limit in (1, 5, 40)}
    met: Counter[str] = Counter()
    for seed in range(1000):
        rng = random.Random(seed)
        scheduler = Scheduler(
            model, max_tokens=rng.choice([3, 3, 6]) * PAGE, max_batch=rng.randint(1, 4),
            chunk=rng.choice([16, 64, 200]), eos_token_id=EOS, share_prefixes=rng.random() < 0.5,
        )  # fmt: skip
        requests: list[tuple[Request, list[int]]] = []
        for _ in range(rng.randint(3, 9)):
            action, live = rng.random(), [each for each in requests if not each[0].done]
            if action < 0.4 or not requests:
                key = rng.randrange(len(PROMPTS)), rng.choice([1, 5, 40])
                requests.append((scheduler.submit(PROMPTS[key[0]], key[1]), known[key]))
            elif action < 0.55 and live:
                request, wanted = rng.choice(live)
                requests.append((scheduler.fork(request), wanted))
            elif action < 0.7 and live:
                rng.choice(live)[0].cancel()
            else:
                scheduler.advance()
        scheduler.run()
        for request, wanted in requests:
            assert request.done
            assert request.tokens == (wanted if request.state == "finished" else wanted[: len(request.tokens)])
            met.update({request.state: 1, "preempted": request.preempted})
        if scheduler.prefixes is not None:
            met["shared"] += scheduler.prefixes.hits
            scheduler.prefixes.clear()
        assert scheduler.pool.free == scheduler.pool.pages
        assert not any(scheduler.pool.references)
    assert min(met[kind] for kind in ("finished", "cancelled", "preempted", "shared")) > 20, met


HOT = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=3)


def test_what_is_drawn_hangs_on_the_seed_and_on_nothing_that_runs_beside_it(model: CompiledModel) -> None:
    by_itself = Scheduler(model, max_tokens=2048, eos_token_id=EOS).submit([9, 10, 11], 40, HOT).result()
    rng = random.Random(4)
    for tokens, chunk in ((2048, 32), (4 * PAGE, 200)):  # the second has too few pages for all
        scheduler = Scheduler(model, max_tokens=tokens, max_batch=4, chunk=chunk, eos_token_id=EOS)
        others = [scheduler.submit(make_prompt(rng, 60), 50) for _ in range(2)]
        drawn = scheduler.submit([9, 10, 11], 40, HOT)
        hot = [scheduler.submit(make_prompt(rng, 60), 50, Sampling(seed=seed)) for seed in range(2)]
        scheduler.run()
        assert drawn.tokens == by_itself
        assert [r.tokens for r in others] == [alone(model, r.prompt, 50) for r in others]
        assert len({tuple(r.tokens) for r in hot}) == 2
    assert by_itself != alone(model, [9, 10, 11], 40)
    again = Scheduler(model, max_tokens=2048, eos_token_id=EOS).submit([9, 10, 11], 40, replace(HOT, seed=4))
    assert again.result() != by_itself


def test_tokens_are_drawn_as_often_as_transformers_would(model: CompiledModel) -> None:
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 2
    processors = [TemperatureLogitsWarper(1.3), TopKLogitsWarper(12), TopPLogitsWarper(0.8)]
    wanted = scores[None]
    for processor in processors:
        wanted = processor(None, wanted)
    sampler = Sampler(Sampling(temperature=1.3, top_k=12, top_p=0.8, seed=0))
    counts = torch.bincount(torch.tensor([drawn([sampler], scores[None])[0] for _ in range(4000)]), minlength=30)
    assert ((counts / 4000 - wanted.softmax(-1)[0]).abs() < 0.03).all()
    assert counts[wanted[0].isinf()].sum() == 0


def test_one_token_to_choose_from_is_the_likeliest(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=2048, eos_token_id=EOS)
    request = scheduler.submit([9, 10], 20, Sampling(top_k=1))
    assert request.result() == alone(model, [9, 10], 20)
    assert request.sampler is not None
    assert request.sampler.seed >= 0


def test_a_fork_draws_by_its_own_seed(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=2048, eos_token_id=[])
    request = scheduler.submit([9, 10], 40, HOT)
    next(iter(request))
    begun = list(request.tokens)
    twins = [scheduler.fork(request, Sampling(temperature=1.3, seed=seed)) for seed in (1, 2)]
    scheduler.run()
    assert all(twin.tokens[: len(begun)] == begun for twin in twins)
    assert len({tuple(r.tokens) for r in (request, *twins)}) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {"temperature": float("nan")}, {"temperature": "hot"}, {"top_k": 0}, {"top_k": 2.0},
        {"top_p": 0.0}, {"top_p": 1.5}, {"seed": -1}, {"seed": True},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(errors.BadInput, match=next(iter(options))):
        Sampling(**options)


def test_text_comes_in_pieces_while_others_are_written(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=2048, eos_token_id=[], tokenizer=Letters())
    requests = [scheduler.submit([9 + n, 10], 30 + n) for n in range(3)]
    cancelled = scheduler.submit([12], 50)
    pieces = []
    for piece in requests[0].stream():
        pieces.append(piece)
        cancelled.cancel()
    assert len(pieces) > 1
    assert "".join(pieces) == Letters().decode(requests[0].tokens)
    for request in (*requests, cancelled):
        assert request.text == Letters().decode(request.tokens)
    assert cancelled.state == "cancelled"


def test_a_tokenizer_that_fails_is_reported_where_text_is_read(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=2048, eos_token_id=[], tokenizer=Letters(fails_at=15))
    bad, good = scheduler.submit([9], 30), scheduler.submit([10], 5)
    with pytest.raises(RuntimeError, match="no such letter"):
        bad.text  # noqa: B018
    assert len(good.text) == 5
    assert len(bad.result()) == 30


def test_bad_requests_are_refused_and_disturb_nobody(model: CompiledModel) -> None:
    scheduler = Scheduler(model, max_tokens=2 * PAGE, eos_token_id=EOS)
    good = scheduler.submit([9, 10], 4)
    for prompt, limit, error in (
        ([], 4, errors.EmptyPrompt), ([10**6], 4, errors.TokenOutOfRange), ([9], 0, errors.BadInput),
        ([9, 2.5], 4, errors.BadInput), ("text", 4, errors.BadInput), (9, 4, errors.BadInput),
        ([9] * 200, 4, errors.PromptTooLong), (torch.ones(2, 3, dtype=torch.long), 4, errors.BadInput),
    ):  # fmt: skip
        with pytest.raises(error):
            scheduler.submit(prompt, limit)
    with pytest.raises(errors.BadInput, match="sampling"):
        scheduler.submit([9], 4, {"temperature": 1.0})  # type: ignore[arg-type]
    with pytest.raises(errors.BadInput, match="tokenizer"):
        next(good.stream())
    scheduler.run()
    assert good.tokens == alone(model, [9, 10], 4)
    with pytest.raises(errors.BadInput, match="does not go on"):
        scheduler.fork(good)


def test_a_model_without_pages_cannot_be_scheduled() -> None:
    with pytest.raises(errors.CacheUnsupported, match='layout="paged"'):
        Scheduler(pair("llama")[1])
