"""What the pages show, put together from what is known: values for the templates, no I/O."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from leveret.dashboard import text
from leveret.dashboard.redaction import Argument, arguments, known_task, result
from leveret.model import (
    DeadLetter,
    Envelope,
    LimitRow,
    LimitState,
    LimitUse,
    Moment,
    ScheduleRow,
    ScheduleState,
    Status,
)
from leveret.model.status import MOST_MOMENTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from leveret.client import App
    from leveret.dashboard.history import Sample
    from leveret.dashboard.redaction import Redact
    from leveret.model import Progress, QueueStats, WorkerReport

#: Dead letters that one page shows.
SHOWN_LETTERS = 100
#: Schedules, and limits, that one page shows.
SHOWN_SCHEDULES = 200
SHOWN_LIMITS = 200
#: Keys that rest, of one limit.
_SHOWN_KEYS = 5


class Totals(msgspec.Struct, frozen=True):
    ready: int
    limited: int
    running: int
    delayed: int
    dead: int
    workers: int
    children: int
    finished: str
    failed: str


def totals(stats: Sequence[QueueStats], workers: Sequence[WorkerReport], latest: Sample | None) -> Totals:
    return Totals(
        sum(one.ready for one in stats),
        sum(one.limited for one in stats),
        sum(one.running for one in stats),
        sum(one.delayed for one in stats),
        sum(one.dead for one in stats),
        len(workers),
        sum(len(one.children) for one in workers),
        text.rate(latest.finished if latest else None),
        text.rate(latest.failed if latest else None),
    )


class Step(msgspec.Struct, frozen=True):
    """One line of a task's timeline."""

    state: str
    at: float
    attempt: int
    error: str
    #: How long it was so (seconds); None: it still is.
    lasted: float | None


def timeline(status: Status) -> list[Step]:
    """From what it was first to what it is now."""
    began = status.started_at if status.state == "running" and status.started_at else status.at
    now = Moment(began, status.state, status.attempt)
    moments = [*status.history, now]
    first = moments[0]
    if status.enqueued_at and first.state not in ("queued", "delayed") and len(status.history) < MOST_MOMENTS:
        # Of a task that began soon nobody was told that it waited. Of a long past the beginning is not kept.
        moments.insert(0, Moment(min(status.enqueued_at, first.at), "queued", 1))
    if status.is_final and status.started_at and all(one.state != "running" for one in moments):
        # A short task tells of its start and its end in one.
        moments.insert(-1, Moment(status.started_at, "running", status.attempt))
    ends: list[float | None] = [*(one.at for one in moments[1:]), None]
    return [
        Step(one.state, one.at, one.attempt, one.error, None if end is None else max(0.0, end - one.at))
        for one, end in zip(moments, ends, strict=True)
    ]


class Bar(msgspec.Struct, frozen=True):
    """A progress bar; ``percent`` is None when the task does not say how much there is to do."""

    done: str
    percent: int | None
    note: str


def bar(progress: Progress | None) -> Bar | None:
    if progress is None:
        return None
    total = progress.total
    if total is None or not total > 0:
        return Bar(f"{progress.done:g}", None, progress.note)
    percent = int(max(0.0, min(1.0, progress.done / total)) * 100)
    return Bar(f"{progress.done:g} of {total:g}", percent, progress.note)


class TaskView(msgspec.Struct, frozen=True):
    """One task whole."""

    status: Status
    steps: list[Step]
    bar: Bar | None
    #: None: not known.
    arguments: list[Argument] | None
    #: None: there is none.
    result: str | None
    #: Seconds that its last attempt ran, or has run so far.
    ran: float | None
    letter: DeadLetter | None
    #: Whether it can be enqueued from here once more.
    repeatable: bool


def task_view(app: App, status: Status, letter: DeadLetter | None, redact: Redact | None) -> TaskView:
    ran = None
    if status.started_at is not None and (status.state == "running" or status.is_final):
        ran = (status.at if status.is_final else time.time()) - status.started_at
    call = known_call(status, letter)
    return TaskView(
        status,
        timeline(status),
        bar(status.progress),
        None if call is None else arguments(app, call, redact),
        result(status.task, bytes(status.encoded_result), redact) if status.has_result else None,
        ran,
        letter,
        status.is_final and letter is None and call is not None and known_task(app, call) is not None,
    )


def known_call(status: Status | None, letter: DeadLetter | None) -> Envelope | None:
    """With the arguments of a task, where they are known."""
    if letter is not None:
        return letter.envelope
    if status is None or status.body is None:
        return None
    return Envelope(status.id, status.queue, status.task, status.body)


class ScheduleView(msgspec.Struct, frozen=True):
    """One schedule; ``call``: its task and the arguments, redacted."""

    row: ScheduleRow
    state: ScheduleState
    next: float | None
    call: str


def schedule_view(app: App, row: ScheduleRow, redact: Redact | None) -> ScheduleView:
    message = row.schedule.message
    given = ", ".join(f"{one.name}={one.value}" for one in arguments(app, message, redact))
    now = time.time()
    return ScheduleView(row, row.state(now), row.coming(now), f"{message.task}({given})")


class LimitView(msgspec.Struct, frozen=True):
    """One limit; ``resting``: some of the keys that rest, and until when, and how many there are."""

    row: LimitRow
    use: LimitUse
    state: LimitState
    resting: list[tuple[str, float]]
    resting_count: int


def limit_view(use: LimitUse, now: float) -> LimitView:
    resting = sorted(use.row.rest(now).items(), key=lambda item: item[1])
    return LimitView(use.row, use, use.row.state(now), resting[:_SHOWN_KEYS], len(resting))


class Search(msgspec.Struct, frozen=True):
    """Which dead letters of a queue are meant; empty: all."""

    queue: str
    task: str = ""
    error: str = ""

    def matches(self, letter: DeadLetter) -> bool:
        """Whether the task's name and the reason contain these, whatever the case."""
        return (
            self.task.casefold() in (letter.envelope.task or "").casefold()
            and self.error.casefold() in letter.reason.casefold()
        )

    def query(self) -> str:
        """As the page's address has it."""
        given = [("queue", self.queue), ("task", self.task), ("error", self.error)]
        return "&".join(f"{name}={text.packed(value)}" for name, value in given if value)


def searched(values: Mapping[str, str], stats: Sequence[QueueStats]) -> Search:
    """What was asked for; without a queue the one with the most dead letters."""
    most = max(stats, key=lambda one: one.dead, default=None)
    queue = values.get("queue") or (most.name if most else "")
    return Search(queue, values.get("task", "").strip(), values.get("error", "").strip())


def stats_of(queue: str, stats: Iterable[QueueStats]) -> QueueStats | None:
    return next((one for one in stats if one.name == queue), None)
