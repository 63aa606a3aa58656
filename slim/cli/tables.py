"""Tables that fit 80 columns, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> None:
    """Prints a table to standard output; the first ``left`` columns hold words, the others numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        words = index < left
        table.add_column(column, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False).print(table)


def rate(value: float) -> str:
    """1234.5 -> 1,234; 12.34 -> 12.3."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
