"""``slim export``: a model as other libraries read it."""

from __future__ import annotations

from pathlib import Path

import click

from slim.cli.models import open_model
from slim.cli.progress import Steps
from slim.cli.shell import debug_option


@click.command()
@click.argument("model", metavar="DIR|MODEL")
@click.option("-o", "--output", required=True, metavar="OUT", help="Where to write it.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["transformers", "compressed-tensors"]),
    default="transformers",
    show_default=True,
    help="Which library's form: compressed-tensors keeps quantised weights, and is what vLLM reads.",
)
@click.option(
    "--dequantize", is_flag=True, help="Write quantised weights as the floating-point numbers they stand for."
)
@debug_option
def export(model: str, output: str, format_: str, dequantize: bool) -> None:
    """Write a model as transformers' from_pretrained, or vLLM, reads it.

    \b
    slim export small -o for-vllm --format compressed-tensors
    """
    with Steps() as steps:
        from slim.runtime.export import check_request

        check_request(output, format_, dequantize=dequantize, source=Path(model))  # now, and not after all the work
        compiled = open_model(model, "eager", steps)
        steps.stage(f"writing {output}")
        compiled.export(output, format_, dequantize=dequantize)
    click.echo(f"exported to {output}")
