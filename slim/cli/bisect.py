"""``slim bisect``: which pass, and which of its sites, spoils the output."""

from __future__ import annotations

import click

from slim.cli.calibration import calibration_option, read_calibration
from slim.cli.progress import Steps
from slim.cli.shell import Number, debug_option, pipeline_option, read_pipeline_option, strict_option

_FOUND = 1  # exit status, so that scripts and git bisect can ask


@click.command()
@click.argument("model", metavar="DIR|MODEL")
@pipeline_option
@calibration_option
@click.option(
    "--threshold",
    type=Number(min=0),
    default=1e-2,
    show_default=True,
    help="How far the output of a probe may be off, relative to its largest number.",
)
@click.option("--lift", "whole", is_flag=True, help="Check the rules of the lift too; reads the whole model.")
@strict_option
@debug_option
def bisect(model: str, pipeline: str, calibration: str | None, threshold: float, whole: bool, strict: bool) -> None:
    """Find the pass after which the output is off by more than a threshold, and the site that does it.

    Ends with status 1 where it finds one, else with 0.

    \b
    slim bisect path/to/model -p 'fold_norms, quantize("int4")' --threshold 0.05
    """
    text = read_pipeline_option(pipeline)
    if not text.strip() and not whole:
        raise click.UsageError(
            "there is nothing to look through: give passes with -p, or --lift for the rules of the lift"
        )
    texts = None if calibration is None else read_calibration(calibration)
    with Steps() as steps:
        from slim.cli.models import load_original
        from slim.inspection import bisect as find
        from slim.passes import as_passes
        from slim.runtime.artifact import is_artifact, load

        passes = as_passes(text)
        steps.stage(f"reading {model}")
        start = load(model, target="eager").program if is_artifact(model) else load_original(model) if whole else model
        found = find(start, passes, threshold, calibration=texts, strict=strict, progress=steps)
    click.echo(str(found))
    if found:
        raise SystemExit(_FOUND)
