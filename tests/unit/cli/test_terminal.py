"""Tables: as rich lays them out, and quickly."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console
from rich.text import Text

from leveret.cli import terminal

if TYPE_CHECKING:
    from rich.table import Table

NAMES = ["mail", "bilder für alle", "日本語", "", "a" * 30]


def table() -> Table:
    made = terminal.table(("name", "ready", "kind"), right=("ready",))
    for number, name in enumerate(NAMES):
        made.add_row(Text(name).append(" (paused)", "yellow"), str(10**number), Text("x", "red"))
    return made


def laid_out(width: int) -> str:
    """By rich."""
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(table())
    return captured.get()


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, columns: int | None) -> str:
    if columns is not None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))
    terminal.show(table())
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [25, 100])
def test_a_terminal_shows_it_as_rich_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    answer = shown(monkeypatch, capsys, columns=columns)
    assert [line.rstrip() for line in answer.splitlines()] == [line.rstrip() for line in laid_out(columns).splitlines()]


def test_elsewhere_no_line_is_broken_or_ends_in_blanks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = shown(monkeypatch, capsys, columns=None)
    assert answer.splitlines() == [line.rstrip() for line in laid_out(500).splitlines()]
    assert len(answer.splitlines()) == 1 + len(NAMES)
