"""``slim generate``: text that goes on from a prompt, as it comes."""

from __future__ import annotations

import time
from typing import Any

import click

from slim import errors
from slim.cli.models import open_model, require_generative
from slim.cli.progress import Steps
from slim.cli.shell import Number, debug_option, target_option


@click.command()
@click.argument("model", metavar="DIR|MODEL")
@click.option("--prompt", required=True, metavar="TEXT", help="What to go on from.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=Number(min=0), help="Sample; 0 takes the likeliest token each time.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K likeliest tokens.")
@click.option("--top-p", type=Number(0, 1, min_open=True), help="Sample from the likeliest tokens that add up to P.")
@click.option("--seed", type=click.IntRange(-(2**63), 2**64 - 1), help="The same text again, when sampling.")
@click.option("--stream/--no-stream", default=True, help="Whether to print words as they come.", show_default=True)
@target_option
@debug_option
def generate(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    stream: bool,
    target: str,
) -> None:
    """Go on from a prompt, and print prompt and continuation.

    Without --temperature, --top-k or --top-p the model's own generation configuration says whether to sample.
    """
    sampling = _sampling(temperature, top_k, top_p)
    if not prompt:
        raise errors.EmptyPrompt()
    with Steps() as steps:
        compiled = open_model(model, target, steps)
        require_generative(compiled, model)
        from slim.compiler.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(compiled.program.facts.source)
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    start = time.perf_counter()
    streamer = _printer(tokenizer) if stream else None
    result = compiled.generate(tokens, max_new_tokens=max_new_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - start
    if not stream:
        click.echo(tokenizer.decode(result[0], skip_special_tokens=True))
    new = result.shape[1] - tokens.shape[1]
    click.echo(f"[{new} tokens in {seconds:.2f} s, after a prompt of {tokens.shape[1]}]", err=True)


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """The options of ``generate`` that the command line's stand for."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in given.items() if value is not None}
    if temperature == 0:
        del given["temperature"]
        for name in given:
            option = f"--{name.replace('_', '-')}"
            raise errors.ContradictoryOptions(a="--temperature 0", b=option, reason="nothing is drawn by lot then")
        return {"do_sample": False}
    return {"do_sample": True, **given} if given else {}


def _printer(tokenizer: Any) -> Any:
    """A transformers streamer that prints whole words as soon as they are certain."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            click.echo(text, nl=stream_end)

    return Printer(tokenizer, skip_special_tokens=True)
