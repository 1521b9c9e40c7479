"""What ``leveret top`` counts, and how it reads keys."""

from __future__ import annotations

import time
from io import StringIO

import pytest
from rich.console import Console

from leveret import every
from leveret.brokers.memory import MemoryBroker
from leveret.cli.top.figures import Collector, Figures
from leveret.cli.top.keys import keys_of
from leveret.cli.top.plain import block, length
from leveret.cli.top.screen import Cursor, jumped, moved, picture
from leveret.model import Envelope, Put, Queue, QueueStats, Schedule, ScheduleRow
from leveret.model.printable import in_line
from leveret.model.reports import ChildReport, RunningTask, WorkerReport
from leveret.model.status import State, Status
from tests.support.waiting import until


def stats(name: str, ready: int) -> QueueStats:
    return QueueStats(name, ready, 0, 0, 0, 0)


async def test_failures_are_those_that_stand() -> None:
    """The latest first; while its next attempt runs a failure is shown, not when that did well, or it was put back."""
    broker, began = MemoryBroker(), time.time()
    await broker.declare([Queue("work")])

    def update(id_: str, state: State, at: float, error: str | None = None) -> Status:
        return Status(id_, state, began + at, "work", "say", error=error)

    await broker.statuses.notify(
        [update("1", "dead", 1.0, "old"), update("2", "retrying", 2.0, "not yet"), update("3", "dead", 3.0)]
    )
    async with Collector(broker, []) as collector:

        async def seen(*ids: str) -> bool:
            figures = await collector.look()
            return [one.id for one in figures.failures] == list(ids)

        assert await seen("3", "2", "1")
        await broker.statuses.notify(
            [update("2", "running", 4.0), update("1", "queued", 4.0), update("4", "dead", 5.0)]
        )
        await until(lambda: seen("4", "3", "2"), "the revived one is gone, the running one stays")
        await broker.statuses.notify([update("2", "succeeded", 6.0), update("3", "dead", 7.0, "again")])
        await until(lambda: seen("3", "4"), "what did well is gone")


def test_keys() -> None:
    assert keys_of("\x1b[A\x1bOBp\tq\x1b[1;5C\x1b") == ["up", "down", "p", "tab", "q", "\x1b[1;5C", "escape"]


def test_the_cursor_stays_with_its_row() -> None:
    """Though others come before it; it goes to the first row when its own is gone, and no further than the last."""
    dead = Status("1", "dead", 1.0, "work")
    few = Figures(0.0, [stats("a", 0), stats("b", 0)], {}, [], [dead])
    assert moved(None, few, 0) == Cursor("queue", "a")
    cursor = moved(Cursor("queue", "b"), few, 0)
    assert moved(cursor, Figures(0.0, [stats("a", 0), stats("aa", 0), stats("b", 0)], {}, [], []), 0) == cursor
    assert moved(cursor, few, 5) == Cursor("failure", "1")
    assert moved(cursor, few, -5) == Cursor("queue", "a")
    assert moved(Cursor("failure", "gone"), few, 0) == Cursor("queue", "a")
    assert moved(cursor, Figures(0.0, [], {}, [], []), 1) is None


def test_the_cursor_goes_through_running_tasks() -> None:
    """Tab leads to the next list that has rows; a running task that is far down is seen when the cursor is on it."""
    running = [RunningTask(f"{number:032x}", "resize", "work", 1, 0.0) for number in range(30)]
    workers = [WorkerReport("here:1", 0.0, ["work"], [ChildReport(7, running, 0, 0)], 0, 0, 0)]
    figures = Figures(1.0, [stats("a", 0)], {}, workers, [Status("1", "dead", 1.0, "work")])
    cursor = jumped(None, figures)
    seen = []
    for _ in range(3):
        seen.append(cursor)
        cursor = jumped(cursor, figures)
    assert seen == [Cursor("queue", "a"), Cursor("run", running[0].id), Cursor("failure", "1")]
    assert cursor == Cursor("queue", "a")
    assert jumped(cursor, Figures(1.0, [stats("a", 0)], {}, [], [])) == cursor
    last = moved(Cursor("failure", "1"), figures, -1)
    assert last == Cursor("run", running[-1].id)
    drawn = Console(width=120, record=True, file=StringIO())
    drawn.print(picture(figures, last, "", width=120, height=20, shows_help=False))
    text = drawn.export_text()
    assert running[-1].id in text
    assert running[0].id not in text
    assert len(text.rstrip().splitlines()) <= 20


def test_equal_tasks_that_run_are_told_apart_at_80_columns() -> None:
    running = [RunningTask(f"{number:032x}", "resize", "work", 1, 0.0) for number in range(3)]
    workers = [WorkerReport("here:1", 0.0, ["work"], [ChildReport(7, running, 0, 0)], 0, 0, 0)]
    drawn = Console(width=80, record=True, file=StringIO())
    drawn.print(picture(Figures(1.0, [], {}, workers, []), None, "", width=80, height=20, shows_help=False))
    text = drawn.export_text()
    assert all(one.id in text for one in running)


def test_the_schedules_are_in_one_line() -> None:
    """How many there are, which comes next, and what does not go on."""

    def row(name: str, following: float | None, origin: str | None = None, *, paused: bool = False) -> ScheduleRow:
        return ScheduleRow(
            Schedule(name, every(days=1), Envelope("", "work", "say", b""), origin), following, paused=paused
        )

    rows = [row("b", 90.0), row("a\x1b", 64.0), row("c", 61.0, "shop:app"), row("d", 61.0, paused=True), row("e", None)]
    figures = Figures(60.5, [], {}, [], [], rows)
    shown = "schedules count=5 paused=1 resting=1 next=a\\x1b in=3.5s"
    assert shown in block(figures)
    drawn = Console(width=120, record=True, file=StringIO())
    drawn.print(picture(figures, None, "", width=120, height=20, shows_help=False))
    assert "5 schedules, a\\x1b in 3.5s, 1 paused, 1 resting" in drawn.export_text()
    assert "schedule" not in block(Figures(0.0, [], {}, [], []))


async def test_schedules_are_collected() -> None:
    broker = MemoryBroker()
    await broker.declare([Queue("work")])
    await broker.schedules.ask(Put(Schedule("a", every(days=1), Envelope("", "work", "say", b""))))
    async with Collector(broker, []) as collector:
        assert [row.name for row in (await collector.look()).schedules] == ["a"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0s"), (3.25, "3.2s"), (42, "42s"), (62, "1m02s"), (3_000, "50m"), (7_260, "2h01m"), (200_000, "2d")],
)
def test_time_spans(seconds: float, text: str) -> None:
    assert length(seconds) == text


def test_text_does_nothing_to_a_terminal() -> None:
    assert in_line("a\x1b[2J\r\nb\u202ec\x9b") == "a\\x1b[2J\\r\\nb\\u202ec\\x9b"
