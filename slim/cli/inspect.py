"""``slim inspect``: the IR of a model, and what it costs; or all of a compilation in HTML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from slim.cli.calibration import calibration_option, read_calibration
from slim.cli.progress import Steps
from slim.cli.shell import (
    charts_option,
    debug_option,
    pipeline_option,
    read_pipeline_option,
    rules_option,
    target_option,
    tell_report,
)
from slim.cli.tables import print_table

if TYPE_CHECKING:
    from slim.compiler.cost import Cost
    from slim.compiler.program import Program
    from slim.compiler.report import PipelineReport
    from slim.inspection.page import Story

_NEW_TOKENS, _ROUNDS = 33, 3  # of the measurement for the roofline


@click.command()
@click.argument("model", metavar="DIR|MODEL")
@pipeline_option
@calibration_option
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to cost it for.")
@charts_option
@rules_option
@click.option("--html", metavar="FILE", help="Write a report to look at in a browser, and print nothing of the IR.")
@click.option(
    "--measure",
    is_flag=True,
    help="With --html: time the model, its layers and the machine, for bars and the roofline.",
)
@click.option("--sensitivity", is_flag=True, help="With --html: measure what compressing each layer alone does.")
@target_option
@debug_option
def inspect(
    model: str,
    pipeline: str,
    calibration: str | None,
    tokens: int,
    charts: bool,
    rules: bool,
    html: str | None,
    measure: bool,
    sensitivity: bool,
    target: str,
) -> None:
    """Print the IR as typed Python, with the lines of the model's own source, and what it costs to run.

    With -p the IR is that after the passes. Nothing is compiled, and without -p no weight is read. With --charts or
    --rules the report of a compiled model is printed as well. --html writes one file that opens without a network:
    the pipeline, the IR before and after each pass, pictures by layer, and the generated code, for which the model is
    compiled.
    """
    _check_options(
        html,
        page={"--measure": measure, "--sensitivity": sensitivity, "--target": target != "auto"},
        terminal={"--charts": charts, "--rules": rules},
    )
    text = read_pipeline_option(pipeline)
    if calibration is not None and not text.strip():
        raise click.UsageError("--calibration is for the passes of -p, and there are none")
    texts = None if calibration is None else read_calibration(calibration)
    with Steps() as steps:
        if html is not None:
            _check_writable(html)
            story = _story(model, text, texts, steps, target)
            _measure(story, tokens, measure, sensitivity, steps)
            _write(story, html, steps)
            return
        program, report = _program(model, text, texts, steps, charts or rules)
    click.echo(str(program))
    if charts and report is None:
        click.echo("\nno pass made a chart: give passes with -p, or a compiled model\n")
    if report is not None:
        click.echo()
        tell_report(report, charts, rules)
        click.echo()
    else:
        _tell_lift(program, rules)
    print_cost(program, tokens)


def _check_options(html: str | None, page: dict[str, bool], terminal: dict[str, bool]) -> None:
    """Refuses options of the HTML report where none is asked for, and those of the terminal where one is."""
    for option, is_given in page.items():
        if is_given and html is None:
            raise click.UsageError(f"{option} is for the report that --html writes")
    for option, is_given in terminal.items():
        if is_given and html is not None:
            raise click.UsageError(f"{option} is for the terminal; the report that --html writes has it anyway")


def _check_writable(html: str) -> None:
    from slim.inspection.page import check_writable

    check_writable(html)  # now, and not after all the work


def _tell_lift(program: Program, rules: bool) -> None:
    """What the rules of the lift nearly matched, and if asked all of them."""
    from slim.compiler.near import near_misses
    from slim.compiler.report import PipelineReport

    if rules:
        click.echo(f"\n{PipelineReport(rules=program.raised).rules_table() or 'no rule was tried'}\n")
    for miss in near_misses(program.raised):
        click.echo(miss)


def _program(
    model: str, text: str, texts: list[str] | None, steps: Steps, told: bool
) -> tuple[Program, PipelineReport | None]:
    """The Program after the passes, and their report; without any, on request, that of a compiled model."""
    from slim.compiler.lift import lift_path
    from slim.compiler.passes_base import Context
    from slim.compiler.pipeline import run_pipeline
    from slim.passes import as_passes
    from slim.runtime.artifact import is_artifact, load

    passes = as_passes(text)
    steps.stage(f"reading {model}")
    if is_artifact(model):
        compiled = load(model, target="eager")
        program, report = compiled.program, compiled.report if told else None
    else:
        program, report = lift_path(model), None
    context = Context(progress=steps, calibration=texts)
    return run_pipeline(program, passes, context) if passes else (program, report)


# -- the report in HTML ------------------------------------------------------------------------------------------------


def _story(model: str, text: str, texts: list[str] | None, steps: Steps, target: str) -> Story:
    """The compilation of ``model``; of a compiled one, what its artifact knows."""
    from slim.codegen import select
    from slim.inspection.tell import compiled_story, tell
    from slim.passes import as_passes
    from slim.runtime.artifact import is_artifact, load

    passes = as_passes(text)
    select(target)  # an unknown one is refused before a model is read
    steps.stage(f"reading {model}")
    if is_artifact(model) and not passes:
        return compiled_story(model, load(model, target=target))
    if not is_artifact(model):
        return tell(model, model, passes, calibration=texts, target=target, progress=steps)
    saved = load(model, target="eager").program
    story = tell(model, saved, passes, calibration=texts, target=target, progress=steps)
    story.start = "as saved"
    return story


def _measure(story: Story, tokens: int, measured: bool, sensitive: bool, steps: Steps) -> None:
    story.tokens, story.sensitive = tokens, sensitive
    if not measured:
        return
    from slim.cli.models import require_generative
    from slim.compiler.machine import measure_machine
    from slim.inspection.times import time_layers
    from slim.runtime.speed import measure, random_prompt

    compiled = story.compiled
    assert compiled is not None, "what is told here was compiled"
    require_generative(compiled, story.model)
    steps.stage("timing")
    prompt = random_prompt(int(compiled.vocabulary or 2), tokens)
    story.speed = measure({"model": compiled}, prompt, _NEW_TOKENS, _ROUNDS, steps)["model"]
    story.machine = measure_machine()
    steps.stage("timing layers")
    story.seconds = time_layers(compiled, tokens)


def _write(story: Story, html: str, steps: Steps) -> None:
    from slim.compiler.report import short_bytes
    from slim.inspection.page import write_page

    steps.stage("drawing")
    file = write_page(story, html)
    click.echo(f"wrote {file} ({short_bytes(file.stat().st_size)})")


def print_cost(program: Program, tokens: int) -> None:
    """Two tables: the whole, as expressions and as numbers, and its parts."""
    from slim.compiler.cost import cost

    found = cost(program)
    columns = ("cost", "in B rows, S new tokens, T in all", f"B=1, {tokens} tokens")
    print_table("", columns, _totals(found, tokens), words=2)
    if found.flops != 0:
        print_table("", ("by operation", "count", "FLOPs, prefill", "bytes moved, decode"), _parts(found, tokens))


def _totals(found: Cost, tokens: int) -> Iterator[tuple[str, str, str]]:
    from slim.compiler.report import short_bytes

    prefill, decode = found.bind(B=1, S=tokens, T=tokens), found.bind(B=1, S=1, T=tokens)
    yield "parameters", "", f"{found.parameters:,}"
    yield "weights", "", short_bytes(found.weight_bytes)
    yield "keys and values", f"{found.kv_bytes_per_token:,} B a token and row", short_bytes(prefill.kv_bytes)
    yield "FLOPs, prefill", str(found.prefill_flops), _flops(prefill.flops)
    yield "FLOPs, decode", str(found.decode_flops), _flops(decode.flops)
    yield "bytes moved, decode", str(found.bytes_moved.subs("S", 1)), short_bytes(decode.bytes_moved)


def _parts(found: Cost, tokens: int) -> Iterator[tuple[str, str, str, str]]:
    import dataclasses

    from slim.compiler.report import short_bytes

    by_kind: dict[str, list[Any]] = {}
    for item in found.work:
        by_kind.setdefault(item.kind, []).append(item)
    for kind, items in by_kind.items():
        part = dataclasses.replace(found, work=tuple(items))
        flops = part.bind(B=1, S=tokens, T=tokens).flops
        moved = part.bind(B=1, S=1, T=tokens).bytes_moved
        yield kind, str(sum(item.nodes for item in items)), _flops(flops), short_bytes(moved)


def _flops(number: int) -> str:
    for size, suffix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {suffix}"
    return str(number)
