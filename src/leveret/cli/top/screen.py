"""The live view as a picture of a terminal's size. Pure."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from leveret.cli.terminal import wants_no_style
from leveret.cli.top.plain import length, upcoming
from leveret.model import WorkerReport
from leveret.model.printable import in_line
from leveret.observe import Rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import JustifyMethod, RenderableType

    from leveret.cli.top.figures import Figures
    from leveret.model import QueueStats, Status

#: From this width on there is room for ids, queues and memory (columns).
_WIDE = 100
_MEBIBYTE = 1024 * 1024
_CHOSEN = "reverse"
#: What the cursor can be on, from top to bottom.
_LISTS = ("queue", "run", "failure")
_KEYS = (
    ("up, down, k, j", "move"),
    ("tab", "to the next list: queues, running tasks, failures"),
    ("p", "pause the queue: workers start nothing more of it"),
    ("r", "resume the queue"),
    ("t", "put the dead task back into its queue"),
    ("c", "cancel the task that runs, or is to be tried again"),
    ("?", "this help, and back"),
    ("q", "quit"),
)


class Cursor(msgspec.Struct, frozen=True):
    """The row that the keys act on: ``queue`` and a name, or ``run`` or ``failure`` and a task's id."""

    kind: str
    key: str


class _Plain(Console):
    """Without colours and bold; the chosen row is still told from the others."""

    def get_style(self, name: str | Style, *, default: Style | str | None = None) -> Style:
        return Style(reverse=super().get_style(name, default=default).reverse)


def console() -> Console:
    return _Plain() if wants_no_style() else Console()


def moved(cursor: Cursor | None, figures: Figures, steps: int) -> Cursor | None:
    """The cursor so many rows further down; on the first row when its own is gone."""
    rows = figures.rows
    if not rows:
        return None
    at = rows.index((cursor.kind, cursor.key)) if cursor and (cursor.kind, cursor.key) in rows else 0
    return Cursor(*rows[min(max(0, at + steps), len(rows) - 1)])


def jumped(cursor: Cursor | None, figures: Figures) -> Cursor | None:
    """The cursor on the first row of the next list that has any."""
    place = -1 if cursor is None else _LISTS.index(cursor.kind)
    wanted = (*_LISTS[place + 1 :], *_LISTS[: place + 1])
    first = {kind: Cursor(kind, key) for kind, key in reversed(figures.rows)}
    return next((first[kind] for kind in wanted if kind in first), None)


def picture(
    figures: Figures, cursor: Cursor | None, message: str, *, width: int, height: int, shows_help: bool
) -> RenderableType:
    """Never higher than the terminal."""
    head = Text(no_wrap=True, overflow="ellipsis")
    head.append("leveret top", "bold")
    head.append(f"  {dt.datetime.fromtimestamp(figures.at).astimezone():%H:%M:%S}", "dim")
    running = sum(len(child.running) for worker in figures.workers for child in worker.children)
    workers = len(figures.workers)
    head.append(f"  {workers} {'worker' if workers == 1 else 'workers'}, {running} running")
    _schedules(head, figures)
    _limits(head, figures)
    if shows_help:
        return Group(head, Text(), _help())
    foot = Text(in_line(message), no_wrap=True, overflow="ellipsis", style="yellow")
    keys = Text("p pause  r resume  t retry  c cancel  ? help  q quit", "dim", no_wrap=True, overflow="ellipsis")
    room = height - 9  # the head, the foot's two, and a heading with a blank line for each of three lists
    worker_rows = _worker_rows(figures)
    heights = _share(room, [len(figures.queues), len(worker_rows), len(figures.failures)])
    is_wide = width >= _WIDE
    return Group(
        head,
        _queues(figures, cursor, heights[0], is_wide=is_wide),
        Text(),
        _workers(worker_rows, figures.at, cursor, heights[1], is_wide=is_wide),
        Text(),
        _failures(figures, cursor, heights[2], is_wide=is_wide),
        foot,
        keys,
    )


def _schedules(head: Text, figures: Figures) -> None:
    if not figures.schedules:
        return
    count = len(figures.schedules)
    head.append(f"  {count} {'schedule' if count == 1 else 'schedules'}")
    following = upcoming(figures.schedules, figures.at)
    if following:
        head.append(f", {in_line(following[0])} in {length(following[1])}")
    for state in ("paused", "resting"):
        number = sum(row.state(figures.at) == state for row in figures.schedules)
        if number:
            head.append(f", {number} {state}", "yellow")


def _limits(head: Text, figures: Figures) -> None:
    if not figures.limits:
        return
    count, waiting = len(figures.limits), sum(one.limited for one in figures.queues)
    head.append(f"  {count} {'limit' if count == 1 else 'limits'}")
    head.append(f", {waiting} wait" if waiting else "")
    for state in ("paused", "resting"):
        number = sum(one.row.state(figures.at) == state for one in figures.limits)
        if number:
            head.append(f", {number} {state}", "yellow")


def _share(room: int, wanted: Sequence[int]) -> list[int]:
    """So many rows for each list: what it wants, if that is not at the cost of another's."""
    given = [0 for _ in wanted]
    for _ in range(max(0, room)):
        hungry = [index for index, want in enumerate(wanted) if given[index] < want]
        if not hungry:
            break
        given[min(hungry, key=given.__getitem__)] += 1
    return given


def _window(chosen: int | None, count: int, rows: int) -> range:
    """Which of the rows are shown: the chosen one among them."""
    start = 0 if chosen is None else min(max(0, chosen - rows + 1), max(0, count - rows))
    return range(start, min(count, start + rows))


def _table() -> Table:
    return Table(box=None, pad_edge=False, expand=True, header_style="bold cyan", padding=(0, 1, 0, 0))


def _cells(table: Table, headings: Sequence[tuple[str, str]], flexible: str) -> None:
    for heading, side in headings:
        justify: JustifyMethod = "right" if side == "r" else "left"
        ratio = 1 if heading == flexible else None
        table.add_column(heading, justify=justify, no_wrap=True, overflow="ellipsis", ratio=ratio)


def _queues(figures: Figures, cursor: Cursor | None, rows: int, *, is_wide: bool) -> Table:
    table = _table()
    has_limited = is_wide or any(one.limited for one in figures.queues)
    headings = ["ready", "limited", "running", "delayed"] if is_wide else ["ready", "limit", "run", "delay"]
    headings += ["dead", "in/s", "out/s", *(["consumers"] if is_wide else [])]
    if not has_limited:
        headings.remove("limit")
    _cells(table, [("queue", "l"), *((heading, "r") for heading in headings)], "queue")
    names = [one.name for one in figures.queues]
    chosen = names.index(cursor.key) if cursor and cursor.kind == "queue" and cursor.key in names else None
    for number in _window(chosen, len(names), rows):
        one = figures.queues[number]
        style = _CHOSEN if number == chosen else ""
        cells = _queue_cells(one, figures.rates.get(one.name, Rate()), is_wide=is_wide, has_limited=has_limited)
        table.add_row(*cells, style=style)
    return table


def _queue_cells(one: QueueStats, rate: Rate, *, is_wide: bool, has_limited: bool) -> list[Text]:
    name = Text()
    if one.paused:
        name.append("paused ", "yellow")  # in front: a long name is cut at its end
    name.append(in_line(one.name))
    running = f"{one.running}+?" if one.silent_consumers else str(one.running)
    limited = [Text(str(one.limited))] if has_limited else []
    cells = [name, Text(str(one.ready)), *limited, Text(running), Text(str(one.delayed))]
    cells += [Text(str(one.dead), "red" if one.dead else ""), Text(_rate(rate.incoming)), Text(_rate(rate.outgoing))]
    return [*cells, Text(str(one.consumers))] if is_wide else cells


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"


class _WorkerRow(msgspec.Struct, frozen=True):
    """A worker by itself, or what one of its children runs."""

    worker: WorkerReport | None = None
    pid: int = 0
    rss: int = 0
    task: str = ""
    id: str = ""
    queue: str = ""
    attempt: int = 0
    since: float | None = None


def _worker_rows(figures: Figures) -> list[_WorkerRow]:
    rows: list[_WorkerRow] = []
    for worker in figures.workers:
        rows.append(_WorkerRow(worker))
        for child in worker.children:
            if not child.running:
                rows.append(_WorkerRow(None, child.pid, child.rss, "idle"))
            rows += [
                _WorkerRow(None, child.pid, child.rss, run.task or "-", run.id, run.queue, run.attempt, run.since)
                for run in child.running
            ]
    return rows


def _workers(rows: Sequence[_WorkerRow], now: float, cursor: Cursor | None, room: int, *, is_wide: bool) -> Table:
    table = _table()
    headings = [("worker, child", "l"), ("runs", "l"), ("for", "r")]
    if is_wide:
        headings = [("worker, child", "l"), ("memory", "r"), ("runs", "l"), ("id", "l"), ("queue", "l")]
        headings += [("attempt", "r"), ("for", "r")]
    _cells(table, headings, "runs")
    ids = [row.id for row in rows]
    chosen = ids.index(cursor.key) if cursor and cursor.kind == "run" and cursor.key in ids else None
    shown = _window(chosen, len(rows), room if len(rows) <= room else max(0, room - 1))
    for number in shown:
        style = _CHOSEN if number == chosen else ""
        table.add_row(*_worker_cells(rows[number], now, is_wide=is_wide), style=style)
    if len(shown) < len(rows) and room:
        table.add_row(Text(f"  {len(rows) - len(shown)} more", "dim"))
    return table


def _worker_cells(row: _WorkerRow, now: float, *, is_wide: bool) -> list[Text]:
    if row.worker is not None:
        one = row.worker
        told = f"{one.finished} done, {one.failed} failed, {one.waiting} wait"
        name, up = Text(in_line(one.name), "bold"), Text(length(now - one.started_at), "dim")
        blank = Text()
        return [name, blank, Text(told), blank, blank, blank, up] if is_wide else [name, Text(told), up]
    pid = Text(f"  {row.pid}")
    runs = Text(in_line(row.task), "dim" if row.since is None else "green")
    since = Text("" if row.since is None else length(now - row.since))
    if not is_wide:
        runs.append(f"  {in_line(row.id)}" if row.id else "", "dim")  # behind, where it is cut if there is no room
        return [pid, runs, since]
    memory = Text(f"{row.rss / _MEBIBYTE:.0f} MiB" if row.rss else "")
    attempt = Text(str(row.attempt) if row.attempt else "")
    return [pid, memory, runs, Text(in_line(row.id)), Text(in_line(row.queue)), attempt, since]


def _failures(figures: Figures, cursor: Cursor | None, rows: int, *, is_wide: bool) -> Table:
    table = _table()
    headings = [("failed", "r"), ("task", "l"), ("state", "l"), ("error", "l")]
    if is_wide:
        headings = [*headings[:3], ("id", "l"), ("queue", "l"), ("attempt", "r"), headings[3]]
    _cells(table, headings, "error")
    ids = [one.id for one in figures.failures]
    chosen = ids.index(cursor.key) if cursor and cursor.kind == "failure" and cursor.key in ids else None
    for number in _window(chosen, len(ids), rows):
        style = _CHOSEN if number == chosen else ""
        table.add_row(*_failure_cells(figures.failures[number], figures.at, is_wide=is_wide), style=style)
    return table


def _failure_cells(one: Status, now: float, *, is_wide: bool) -> list[Text]:
    state = Text(one.state, "red" if one.state == "dead" else "yellow")
    # The last line says what happened; only so much is laid out.
    cells = [Text(length(now - one.at)), Text(in_line(one.task or "-")[:40]), state]
    if is_wide:
        cells += [Text(in_line(one.id)[:32]), Text(in_line(one.queue)[:24]), Text(str(one.attempt))]
    return [*cells, Text(in_line((one.error or "")[:400]))]


def _help() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for keys, text in _KEYS:
        table.add_row(Text(keys, "bold"), Text(text))
    table.add_row(Text(), Text())
    table.add_row(Text("limited"), Text("waits for a limit, or for its turn; leveret limits tells more"))
    table.add_row(Text("in/s, out/s"), Text("of the last 5 s; only tasks whose results are kept"))
    return table
