"""``slim compile``: a model in, an artifact out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from slim.cli.calibration import calibration_option, read_calibration
from slim.cli.progress import Steps
from slim.cli.shell import (
    charts_option,
    debug_option,
    pipeline_option,
    read_pipeline_option,
    rules_option,
    strict_option,
    target_option,
    tell_report,
)

if TYPE_CHECKING:
    from slim.runtime.compiled import CompiledModel


@click.command("compile")
@click.argument("model")
@pipeline_option
@click.option("-o", "--output", required=True, metavar="DIR", help="Where to save the compiled model.")
@calibration_option
@target_option
@strict_option
@click.option("--verify/--no-verify", default=True, help="Whether to check IR and output after every pass.")
@click.option("--dump", metavar="DIR", help="Write the IR after every stage here, as Python, and what was generated.")
@charts_option
@rules_option
@debug_option
def compile_(
    model: str,
    pipeline: str,
    output: str,
    calibration: str | None,
    target: str,
    strict: bool,
    verify: bool,
    dump: str | None,
    charts: bool,
    rules: bool,
) -> None:
    """Compile MODEL and save it.

    \b
    slim compile path/to/model -p 'fold_norms, quantize("int8")' -o small
    """
    text = read_pipeline_option(pipeline)
    texts = None if calibration is None else read_calibration(calibration)
    with Steps() as steps:
        from slim.api import compile
        from slim.passes import as_passes
        from slim.runtime.artifact import check_destination

        passes = as_passes(text)
        check_destination(output)  # now, and not after all the work
        steps.stage(f"lifting {model}")
        compiled = compile(
            model, passes, calibration=texts, target=target, verify=verify, strict=strict, dump=dump, progress=steps
        )
        steps.stage(f"saving to {output}")
        compiled.save(output)
    _tell(compiled, output, charts, rules)


def _tell(compiled: CompiledModel, output: str, charts: bool, rules: bool) -> None:
    from slim.compiler.report import short_bytes, short_count

    tell_report(compiled.report, charts, rules)
    program = compiled.program
    click.echo(f"\nsaved to {output}: {short_count(program.parameters)} parameters in {short_bytes(program.nbytes)}")
