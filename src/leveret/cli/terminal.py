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
    """Print a table; where there is no terminal, without blanks at the ends of lines."""
    there = console()
    if sys.stdout.isatty():
        there.print(rows)
        return
    with there.capture() as captured:
        there.print(rows)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def table(headings: Sequence[str], right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """``right``: which stand at the right; ``whole``: which are never broken into lines."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        made.add_column(
            heading, justify="right" if heading in right else "left", no_wrap=heading in whole, overflow="fold"
        )
    return made
