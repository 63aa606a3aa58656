"""Timing takes turns, leaves the first round out, and counts what it says."""

import pytest
import torch

from slim.runtime import speed
from slim.runtime.speed import Rate, measure, random_prompt


class Fake:
    """A model that takes one second to read, and half a second a token to write."""

    device = torch.device("cpu")

    def __init__(self, name: str, clock: list[float], calls: list[str]) -> None:
        self.name, self.clock, self.calls = name, clock, calls

    def generate(self, tokens, *, max_new_tokens: int, streamer, **options) -> None:
        assert options["do_sample"] is False
        assert options["eos_token_id"] is None
        self.calls.append(self.name)
        streamer.put(tokens)
        self.clock[0] += 1.0
        for index in range(max_new_tokens):
            self.clock[0] += 0.5 if index else 0.0
            streamer.put(tokens[:, 0])
        streamer.end()


def test_models_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls, told = [0.0], [], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    models = {name: Fake(name, clock, calls) for name in "AB"}
    speeds = measure(models, torch.zeros(2, 6, dtype=torch.long), 5, 3, lambda *step: told.append(step))
    assert calls == ["A", "B"] * 4
    assert speeds["A"].prefills == [12.0] * 3  # two rows of six tokens in a second
    assert speeds["B"].decodes == [4.0] * 3  # two rows of four tokens in two seconds
    assert [step[1:] for step in told] == [(index, 8) for index in range(8)]


def test_a_rate_is_the_best_and_the_middle() -> None:
    assert Rate.of([1.0, 9.0, 3.0]) == Rate(best=9.0, median=3.0)


def test_the_prompt_is_the_same_each_time() -> None:
    prompt = random_prompt(50, 32)
    assert prompt.shape == (1, 32)
    assert int(prompt.max()) < 50
    assert torch.equal(prompt, random_prompt(50, 32))
