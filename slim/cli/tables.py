"""Tables that fit 80 columns, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1, indent: int = 0
) -> None:
    """Prints a table to standard output; the first ``words`` columns are aligned left, the others are numbers.

    Without any column names there is no head.
    """
    columns = tuple(columns)
    table = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
        show_edge=False,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        is_words = index < words
        table.add_column(column, justify="left" if is_words else "right", no_wrap=not is_words, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    with console.capture() as capture:  # rich fills lines up with blanks, which show when a table is copied
        console.print(Padding(table, (0, 0, 0, indent)))
    console.out("\n".join(line.rstrip() for line in capture.get().splitlines()), highlight=False)


def rate(value: float) -> str:
    """1234.5 -> 1,234; 12.34 -> 12.3."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
