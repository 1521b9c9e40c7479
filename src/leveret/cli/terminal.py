"""What is shown: in a terminal as it fits there, and elsewhere in whole lines, for other programs."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

#: Where there is no terminal no line is broken (columns).
_ENDLESS = 100_000


def wants_no_style() -> bool:
    """https://no-color.org, and bold is a style like the colours."""
    return bool(os.environ.get("NO_COLOR"))


def console() -> Console:
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else _ENDLESS,
        highlight=False,
        color_system=None if wants_no_style() else "auto",
    )


def show(rows: Table) -> None:
    """Print a table; where there is no terminal, without blanks at the ends of lines.

    rich lays out each cell in turn, which takes a millisecond a row. Rows that need no folding are put together here.
    """
    there, lines = console(), _lines(rows)
    if not sys.stdout.isatty():
        click.echo("\n".join(line.plain.rstrip() for line in lines))
    elif max(line.cell_len for line in lines) <= there.width:
        there.print(*lines, sep="\n", soft_wrap=True)
    else:
        there.print(rows)


def _lines(rows: Table) -> list[Text]:
    """The header and the rows, each in one line."""
    from rich.text import Text

    columns: list[list[Text]] = []
    for column in rows.columns:
        cells = [Text(str(column.header), str(rows.header_style))]
        cells += [cell.copy() if isinstance(cell, Text) else Text(str(cell)) for cell in column.cells]
        width = max(cell.cell_len for cell in cells)
        for cell in cells:
            cell.align("right" if column.justify == "right" else "left", width)
        columns.append(cells)
    return [Text("  ").join(cells) for cells in zip(*columns, strict=True)]


def table(headings: Sequence[str], right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """``right``: which stand at the right; ``whole``: which are never broken into lines."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        made.add_column(
            heading, justify="right" if heading in right else "left", no_wrap=heading in whole, overflow="fold"
        )
    return made
