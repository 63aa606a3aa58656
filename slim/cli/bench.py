"""``slim bench``: how fast a model reads and writes, beside the original where that is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from slim.cli.models import open_model, open_original, require_generative, require_there
from slim.cli.progress import Steps
from slim.cli.shell import debug_option, target_option, tune_option
from slim.cli.tables import print_table, rate

if TYPE_CHECKING:
    from slim.runtime.speed import Speed


@click.command()
@click.argument("model", metavar="DIR|MODEL")
@click.option("--prompt-length", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to read.")
@click.option("--new-tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Tokens to write.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How often each is timed.")
@click.option("--against", metavar="MODEL", help="Time this one too, as transformers runs it, turn by turn.")
@target_option
@tune_option
@debug_option
def bench(
    model: str, prompt_length: int, new_tokens: int, rounds: int, against: str | None, target: str, tune: float | None
) -> None:  # fmt: skip
    """Time prefill and decode, batch 1, greedy, on random tokens.

    Compare numbers of one run only: with --against the two take turns, so that neighbours on the machine slow both.
    """
    with Steps() as steps:
        if against is not None:
            require_there(against)
        compiled = open_model(model, target, steps, tune)
        require_generative(compiled, model)
        models: dict[str, Any] = {} if against is None else {f"{against} (original)": open_original(against, steps)}
        models[model] = compiled
        from slim.runtime.speed import measure, random_prompt

        vocabulary = min(int(m.config.get_text_config().vocab_size) for m in models.values())
        steps.stage("timing")
        speeds = measure(models, random_prompt(vocabulary, prompt_length), new_tokens, rounds, steps)
    title = f"Tokens a second: {prompt_length} read, {new_tokens} written, {rounds} rounds, {_threads()}"
    print_speeds(title, speeds)


def print_speeds(title: str, speeds: dict[str, Speed]) -> None:
    """A table of speeds; the last is also compared with the first."""
    columns = ("model", "prefill best", "median", "decode best", "median")
    rows = [[name, *map(rate, _numbers(speed))] for name, speed in speeds.items()]
    if len(speeds) > 1:
        first, *_, last = map(_numbers, speeds.values())
        rows.append(["last / first", *(f"{b / a:.2f}x" for a, b in zip(first, last, strict=True))])
    print_table(title, columns, rows)


def _numbers(speed: Speed) -> tuple[float, float, float, float]:
    return speed.prefill.best, speed.prefill.median, speed.decode.best, speed.decode.median


def _threads() -> str:
    import torch

    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"
