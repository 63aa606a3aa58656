"""What notebooks show of a Program and of a report: small pieces of HTML without script or style sheet."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slim.compiler.program import Program
    from slim.compiler.report import PipelineReport

_LINES = 2000  # of IR; a notebook keeps all that it shows


def program_html(program: Program) -> str:
    """The IR, folded below a line that says what it is."""
    text = str(program).splitlines()
    shown = "\n".join(text[:_LINES]) + (f"\n... and {len(text) - _LINES} more lines" if len(text) > _LINES else "")
    return _folded(text[0].removeprefix("# "), f"<pre>{escape(shown)}</pre>")


def report_html(report: PipelineReport) -> str:
    """The table of the passes, and below it, folded, all that ``print`` says."""
    from slim.compiler.report import COLUMNS, table_rows

    head = "".join(f"<th>{escape(column)}</th>" for column in COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in table_rows(report))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if report.passes else ""
    return table + _folded("report", f"<pre>{escape(str(report))}</pre>")


def together(title: str, parts: Iterable[str]) -> str:
    """Several pieces below a title."""
    return f"<div><code>{escape(title)}</code>{''.join(parts)}</div>"


def _cells(row: Iterable[str]) -> str:
    return "".join(f"<td>{escape(cell)}</td>" for cell in row)


def _folded(title: str, html: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{html}</details>"
