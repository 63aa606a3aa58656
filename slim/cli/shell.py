"""What every command shares: how mistakes and Ctrl-C end, and the options that appear more than once."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slim import errors

if TYPE_CHECKING:
    from slim.compiler.report import PipelineReport


class Number(click.FloatRange):
    """A finite float in a range; click's own takes NaN for one in any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number.", param, ctx)
        return number


_DEBUG = "slim.debug"
MISTAKE, INTERRUPTED = 2, 130  # exit statuses; 130 is what a shell gives a command that SIGINT ended


class Shell(click.Group):
    """The group of commands: slim's own errors end as a message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except errors.SlimError as error:
            if ctx.meta.get(_DEBUG):
                click.echo("".join(traceback.format_exception(error)), nl=False, err=True)
            else:
                _tell(error)
            ctx.exit(MISTAKE)
        except (KeyboardInterrupt, ImportError) as error:
            if isinstance(error, ImportError) and not isinstance(error.__cause__, KeyboardInterrupt):
                raise
            click.echo("interrupted", err=True)  # also where a library that was being loaded made another error of it
            ctx.exit(INTERRUPTED)


def _tell(error: errors.SlimError) -> None:
    click.secho("error: ", fg="red", bold=True, nl=False, err=True)
    for line in (str(error), *getattr(error, "__notes__", ())):
        click.echo(line, err=True)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value or ctx.meta.get(_DEBUG, False)


def show_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Prints the version and ends."""
    if value:
        from slim.runtime.artifact import slim_version

        click.echo(f"slim {slim_version()}")
        ctx.exit()


Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

debug_option: Decorator = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback of an error."
)
target_option: Decorator = click.option(
    "--target", default="auto", show_default=True, help="What runs it: auto, cpu, cuda or eager."
)
tune_option: Decorator = click.option(
    "--tune",
    type=Number(min=0, min_open=True),
    metavar="SECONDS",
    help="Spend this on finding the fastest configurations of GPU kernels; what was found is kept for later.",
)
pipeline_option: Decorator = click.option(
    "-p",
    "--passes",
    "pipeline",
    default="",
    metavar="PIPELINE",
    help="The passes, in order: 'fold_norms, quantize(\"int8\")', or @FILE to read them from. See `slim passes`.",
)
strict_option: Decorator = click.option(
    "--strict/--no-strict", default=True, help="Whether a pass that matches nothing is an error."
)
charts_option: Decorator = click.option(
    "--charts", is_flag=True, help="Print the charts of the report as text: what passes found in each layer."
)
rules_option: Decorator = click.option(
    "--rules",
    is_flag=True,
    help="Print how often each rewrite rule was tried and matched: of the lift, and of passes made of rules.",
)


def tell_report(report: PipelineReport, charts: bool, rules: bool) -> None:
    """Prints a report, and if asked the rules and charts behind it."""
    click.echo(str(report))
    if rules:
        click.echo(f"\n{report.rules_table() or 'no rule was tried'}")
    for chart in report.charts if charts else ():
        click.echo(f"\n{chart}")
    if charts and not report.charts:
        click.echo("\nno pass made a chart")


def read_pipeline_option(text: str) -> str:
    """The pipeline text of ``-p``: itself, or what is in the file after an @."""
    return read_text(text[1:], "-p") if text.startswith("@") else text


def read_text(path: str, option: str) -> str:
    """The text of a file that was named on the command line; raises UnreadableFile."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise errors.UnreadableFile(option=option, path=path, reason="it is not UTF-8 text") from error
    except OSError as error:
        raise errors.UnreadableFile(option=option, path=path, reason=error.strerror or str(error)) from error
