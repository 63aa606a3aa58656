"""``slim inspect``: the IR of a model, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from slim.cli.calibration import calibration_option, read_calibration
from slim.cli.progress import Steps
from slim.cli.shell import charts_option, debug_option, pipeline_option, read_pipeline_option, tell_report
from slim.cli.tables import print_table

if TYPE_CHECKING:
    from slim.compiler.cost import Cost
    from slim.compiler.program import Program
    from slim.compiler.report import PipelineReport


@click.command()
@click.argument("model", metavar="DIR|MODEL")
@pipeline_option
@calibration_option
@click.option("--tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to cost it for.")
@charts_option
@debug_option
def inspect(model: str, pipeline: str, calibration: str | None, tokens: int, charts: bool) -> None:
    """Print the IR as typed Python, with the lines of the model's own source, and what it costs to run.

    With -p the IR is that after the passes. Nothing is compiled, and without -p no weight is read. With --charts the
    report of a compiled model is printed as well.
    """
    text = read_pipeline_option(pipeline)
    texts = None if calibration is None else read_calibration(calibration)
    with Steps() as steps:
        program, report = _program(model, text, texts, steps, charts)
    click.echo(str(program))
    if charts and report is None:
        click.echo("\nno pass made a chart: give passes with -p, or a compiled model\n")
    if report is not None:
        click.echo()
        tell_report(report, charts)
        click.echo()
    print_cost(program, tokens)


def _program(
    model: str, text: str, texts: list[str] | None, steps: Steps, charts: bool
) -> tuple[Program, PipelineReport | None]:
    """The Program after the passes, and their report; without any, on request, that of a compiled model."""
    from slim.compiler.lift import lift_path
    from slim.compiler.passes_base import Context
    from slim.compiler.pipeline import run_pipeline
    from slim.passes import parse_pipeline
    from slim.runtime.artifact import is_artifact, load

    passes = parse_pipeline(text)
    steps.stage(f"reading {model}")
    if is_artifact(model):
        compiled = load(model, target="eager")
        program, report = compiled.program, compiled.report if charts else None
    else:
        program, report = lift_path(model), None
    context = Context(progress=steps, calibration=texts)
    return run_pipeline(program, passes, context) if passes else (program, report)


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
