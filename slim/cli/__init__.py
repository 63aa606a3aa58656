"""The command line: ``slim compile | generate | bench | eval | export | inspect | bisect | passes``.

Everything here is cheap to import, so that ``slim --help`` is quick; torch and transformers come inside the commands.
"""

from __future__ import annotations

import click

from slim.cli.bench import bench
from slim.cli.bisect import bisect
from slim.cli.compile import compile_
from slim.cli.evaluate import evaluate
from slim.cli.export import export
from slim.cli.generate import generate
from slim.cli.inspect import inspect
from slim.cli.passes import passes
from slim.cli.shell import Shell, debug_option, show_version

__all__ = ["main"]


@click.group(cls=Shell, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show the version."
)
@debug_option
def main() -> None:
    """slim makes transformer models smaller and faster.

    A MODEL is a transformers directory or a hub id; a DIR is what `slim compile` wrote. Where a command takes one it
    takes the other. Tables go to standard output, progress to standard error; mistakes end with status 2.
    """


for command in (compile_, generate, bench, evaluate, export, inspect, bisect, passes):
    main.add_command(command)
