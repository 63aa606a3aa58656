"""``slim compile``: a model in, an artifact out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slim import errors
from slim.cli.progress import Steps
from slim.cli.shell import debug_option, pipeline_option, read_pipeline_option, read_text, target_option

if TYPE_CHECKING:
    from slim.runtime.compiled import CompiledModel


@click.command("compile")
@click.argument("model")
@pipeline_option
@click.option("-o", "--output", required=True, metavar="DIR", help="Where to save the compiled model.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="Texts for passes that need statistics: apart by blank lines, or JSON lines that have a text (.jsonl).",
)
@target_option
@click.option("--strict/--no-strict", default=True, help="Whether a pass that matches nothing is an error.")
@click.option("--verify/--no-verify", default=True, help="Whether to check IR and output after every pass.")
@click.option("--dump", metavar="DIR", help="Write the IR after every stage here, as Python, and what was generated.")
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
) -> None:
    """Compile MODEL and save it.

    \b
    slim compile path/to/model -p 'fold_norms, quantize("int8")' -o small
    """
    text = read_pipeline_option(pipeline)
    texts = None if calibration is None else read_calibration(calibration)
    with Steps() as steps:
        from slim.api import compile
        from slim.passes import parse_pipeline
        from slim.runtime.artifact import check_destination

        passes = parse_pipeline(text)
        check_destination(output)  # now, and not after all the work
        steps.stage(f"lifting {model}")
        compiled = compile(
            model, passes, calibration=texts, target=target, verify=verify, strict=strict, dump=dump, progress=steps
        )
        steps.stage(f"saving to {output}")
        compiled.save(output)
    _tell(compiled, output)


def _tell(compiled: CompiledModel, output: str) -> None:
    from slim.compiler.report import short_bytes, short_count

    click.echo(str(compiled.report))
    program = compiled.program
    click.echo(f"\nsaved to {output}: {short_count(program.parameters)} parameters in {short_bytes(program.nbytes)}")


def read_calibration(path: str) -> list[str]:
    """The texts of a file: those apart by blank lines, or the ``text`` of each line of JSON where it is a .jsonl.

    Raises:
        UnreadableFile: where it cannot be read, or holds no text.
    """
    content = read_text(path, "--calibration")
    if Path(path).suffix == ".jsonl":
        texts = [_text_of(line, number, path) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    else:
        texts = [part.strip() for part in content.split("\n\n")]
    texts = [text for text in texts if text]
    if not texts:
        raise errors.UnreadableFile(option="--calibration", path=path, reason="it holds no text")
    return texts


def _text_of(line: str, number: int, path: str) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f'line {number} is not JSON such as {{"text": "..."}}'
        raise errors.UnreadableFile(option="--calibration", path=path, reason=reason) from error
