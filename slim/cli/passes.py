"""``slim passes``: what can be put into a pipeline."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from slim.cli.shell import debug_option
from slim.cli.tables import print_table

if TYPE_CHECKING:
    from slim.compiler.passes_base import Pass


@click.command()
@debug_option
def passes() -> None:
    """List the passes, with their options."""
    from slim.passes import PASSES

    for name, kind in PASSES.items():
        first = (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")
        click.echo(click.style(name, bold=True) + f"  {'lossless' if kind.lossless else 'lossy'}")
        click.echo(click.wrap_text(first, width=80, initial_indent="  ", subsequent_indent="  "))
        options = list(_options(kind))
        if options:
            print_table("", ("option", "values", "default"), options, words=3, indent=4)
            click.echo()
        else:
            click.echo("  no options\n")


def _options(kind: type[Pass]) -> Iterator[tuple[str, str, str]]:
    from slim.compiler.options import literal, show_kind
    from slim.compiler.passes_base import option_types

    types = option_types(kind)
    for option in dataclasses.fields(kind):
        default = "must be given" if option.default is dataclasses.MISSING else literal(option.default)
        yield option.name, show_kind(types[option.name]), default
