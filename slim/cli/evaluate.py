"""``slim eval``: perplexity on a text."""

from __future__ import annotations

import time

import click

from slim import errors
from slim.cli.models import open_model, require_generative
from slim.cli.progress import Steps
from slim.cli.shell import debug_option, read_text, target_option
from slim.cli.tables import print_table


@click.command("eval")
@click.argument("model", metavar="DIR|MODEL")
@click.option("--text", "file", required=True, metavar="FILE", help="UTF-8 text to predict.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Predict no more than the first N tokens.")
@click.option(
    "--context", type=click.IntRange(min=2), help="Tokens read at once; else what the model was made for, 2048 at most."
)
@click.option("--pieces", metavar="MARKER", help="Predict pieces, one before each paragraph that begins with MARKER.")
@click.option("--limit", type=click.IntRange(min=1), help="No more pieces than this.")
@target_option
@debug_option
def evaluate(
    model: str,
    file: str,
    max_tokens: int | None,
    context: int | None,
    pieces: str | None,
    limit: int | None,
    target: str,
) -> None:
    """Perplexity and bits per byte on a text.

    The text is read in windows that do not overlap, each after the tokenizer's BOS. With --pieces it is cut at
    paragraphs instead, each piece read on its own, after BOS, up to the context.
    """
    _check(max_tokens, pieces, limit)
    text = read_text(file, "--text")
    with Steps() as steps:
        compiled = open_model(model, target, steps)
        require_generative(compiled, model)
        from slim.compiler.tokenizer import load_tokenizer
        from slim.runtime import perplexity

        tokenizer = load_tokenizer(compiled.program.facts.source)
        steps.stage("cutting the text")
        length = perplexity.reading_length(compiled, context)
        if pieces is None:
            passages = perplexity.windows(text, tokenizer, length, max_tokens)
        else:
            passages = perplexity.pieces(text, tokenizer, length, pieces, limit)
        start = time.perf_counter()
        score = perplexity.score(compiled, passages, steps)
        seconds = time.perf_counter() - start
    rows = [
        ("perplexity", f"{score.perplexity:.4f}"),
        ("bits per byte", f"{score.bits_per_byte:.4f}"),
        ("tokens predicted", f"{score.tokens:,}"),
        ("bytes they stand for", f"{score.nbytes:,}"),
        (f"{'windows' if pieces is None else 'pieces'} of at most {length} tokens", f"{len(passages):,}"),
        ("seconds", f"{seconds:.1f}"),
    ]
    print_table(f"{model} on {file}", ("", ""), rows)
    if changed := compiled.kv_cache.changes:
        click.echo(f"note: texts are read at once, without a cache, so that {changed} costs nothing here", err=True)


def _check(max_tokens: int | None, pieces: str | None, limit: int | None) -> None:
    if pieces is not None and max_tokens is not None:
        raise errors.ContradictoryOptions(a="--pieces", b="--max-tokens", reason="pieces are counted by --limit")
    if pieces is None and limit is not None:
        raise errors.ContradictoryOptions(a="--limit", b="no --pieces", reason="it says how many pieces to read")
