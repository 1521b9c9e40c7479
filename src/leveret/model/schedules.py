"""Schedules: which tasks are enqueued at which instants. Values, and the pure rules of what becomes of them.

A schedule is one row, which holds the message too: whoever acts on it needs none of the application's code. What is
asked (`Put`, `Pause`, ...) and what falls due (`advance`) make a new row of it, and tasks to store with that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.durations import show, spell_seconds
from leveret.model.messages import Envelope
from leveret.model.names import MAX_ID, fits
from leveret.model.options import overrides_in
from leveret.model.status import enqueued
from leveret.model.timing import MOST_CAUGHT_UP, ON_TIME, Cron, Every, moment_text

if TYPE_CHECKING:
    from leveret.model.status import Status
    from leveret.model.timing import Timing

#: What a schedule does; see `ScheduleRow.state`.
ScheduleState: TypeAlias = Literal["active", "paused", "resting", "ended"]
#: Headers of a scheduled task: the schedule's name, and the instant in RFC 3339.
SCHEDULE, SCHEDULED_FOR = "leveret-schedule", "leveret-scheduled-for"
#: A schedule's name is the beginning of its tasks' ids.
MAX_SCHEDULE_NAME = MAX_ID - len("@20260329T010000.000Z.000")
#: The schedules of an application's code rest when no worker of it has been there for so long (seconds).
DECLARED_FOR = 60.0
#: Among what is missed, the last instant is looked for in steps back that begin so long (seconds).
_FIRST_STEP = 60.0


class Schedule(msgspec.Struct, frozen=True, omit_defaults=True):
    """What somebody said of a schedule."""

    name: str
    timing: Cron | Every
    #: The task, without an id and with no enqueueing; ``expires_at`` is the seconds that it may wait.
    message: Envelope
    #: The application whose code says so; None: it is data, and stays until somebody removes it.
    origin: str | None = None


class ScheduleRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """A schedule, and how far it is."""

    schedule: Schedule
    #: The next instant (Unix time, seconds); None: there is none.
    next: float | None
    #: The last instant for which a task was stored.
    last: float | None = None
    #: The ids of its last tasks, which may not be finished.
    recent: list[str] = []
    paused: bool = False
    #: Why it was paused, if nobody asked for it.
    problem: str = ""
    #: When the program that declared it began, and when the last one said that it is there; of code alone.
    started: float = 0.0
    declared: float = 0.0
    #: How many instants passed without a task: no worker was there, or the one before was not finished.
    missed: int = 0
    skipped: int = 0

    @property
    def name(self) -> str:
        return self.schedule.name

    @property
    def when(self) -> str:
        """When it comes, in words."""
        timing = self.schedule.timing
        return f"{timing}, up to {spell_seconds(timing.jitter)} later" if timing.jitter else str(timing)

    @property
    def due(self) -> float | None:
        """When the next task is to be stored; None: it is not known to be."""
        if self.next is None or self.paused:
            return None
        return self.schedule.timing.due(self.name, self.next)

    def is_to_be_declared(self, started: float, now: float) -> bool:
        """Whether it must be noted that a program is there that declares it so."""
        return started > self.started or now - self.declared > DECLARED_FOR / 2

    def rests(self, now: float) -> bool:
        """Whether its application has not been there for long: nothing is stored that nobody would run."""
        return self.schedule.origin is not None and now - self.declared > DECLARED_FOR

    def state(self, now: float) -> ScheduleState:
        """``resting``: see `rests`; ``ended``: there is no next instant; and ``paused`` or ``active``."""
        if self.paused:
            return "paused"
        if self.rests(now):
            return "resting"
        return "ended" if self.next is None else "active"

    def coming(self, now: float) -> float | None:
        """The next instant, while it goes on; None: none is to be expected."""
        return self.next if self.state(now) == "active" else None

    def last_task(self) -> Envelope | None:
        """The task that was stored last, as it was but for the time; None: nothing is known of it."""
        if self.last is None or not self.recent:
            return None
        return msgspec.structs.replace(_task(self.schedule, self.last, self.last), id=self.recent[-1])


class Put(msgspec.Struct, frozen=True, tag=True):
    """A schedule that is data is there from now on, in the place of one of its name."""

    schedule: Schedule


class Declare(msgspec.Struct, frozen=True, tag=True):
    """An application's code has these schedules, and no others."""

    origin: str
    #: When the program that says so began (Unix time, seconds): of two that differ the newer is right.
    started: float
    schedules: list[Schedule]


class Remove(msgspec.Struct, frozen=True, tag=True):
    """The schedule goes."""

    name: str


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Its instants pass, and nothing is stored."""

    name: str


class Resume(msgspec.Struct, frozen=True, tag=True):
    """It goes on with the next instant after now."""

    name: str


class Trigger(msgspec.Struct, frozen=True, tag=True):
    """One task is stored besides, now: at that Unix time, which is in its id."""

    name: str
    at: float

    @property
    def id(self) -> str:
        """The task's."""
        return f"{self.name}@{moment_text(self.at)}"


ScheduleRequest: TypeAlias = Put | Declare | Remove | Pause | Resume | Trigger


class Change(msgspec.Struct, frozen=True):
    """What becomes of rows: new ones by name, None for those that go; and the tasks that are stored with that."""

    rows: dict[str, ScheduleRow | None] = {}
    tasks: Sequence[Envelope] = ()
    #: Schedules that another program declares otherwise, which is the newer one.
    outdated: Sequence[str] = ()


NO_CHANGE = Change()


def told_of(tasks: Sequence[Envelope], now: float) -> list[Status]:
    """What is told of tasks that a schedule stored: nothing of those whose results are not kept."""
    kept = [one for one in tasks if overrides_in(one.headers).get("store_result") is not False]
    return [enqueued(one, now) for one in kept]


def check_schedule_name(name: object) -> None:
    """Raises ConfigurationError for a name that cannot begin the ids of tasks."""
    if not isinstance(name, str) or not name.isprintable() or not fits(name, MAX_SCHEDULE_NAME):
        raise ConfigurationError(
            f"schedule name {show(name)} must be printable text of 1 to {MAX_SCHEDULE_NAME} bytes: the ids of its "
            "tasks begin with it"
        )


def asked(request: ScheduleRequest, rows: Mapping[str, ScheduleRow], now: float) -> Change | None:
    """What becomes of the rows that a request concerns; None: there is no schedule of that name.

    ``rows``: the one that it names, of `Declare` all.
    """
    match request:
        case Put(schedule):
            return _put(schedule, rows.get(schedule.name), now)
        case Declare():
            return _declared(request, rows, now)
        case Remove(name) | Pause(name) | Resume(name) | Trigger(name, _):
            row = rows.get(name)
            return None if row is None else _one(request, row, now)


def advance(row: ScheduleRow, now: float, unfinished: Mapping[str, bool]) -> Change:
    """What falls due by now. ``unfinished``: of its recent tasks those that are not, and whether each runs."""
    if row.next is None or row.paused or row.rests(now):
        return NO_CHANGE
    timing = row.schedule.timing
    try:
        instants, missed = _to_store(row.name, timing, row.next, now)
        following = _following(row.name, timing, row.next, now)
    except ConfigurationError as error:
        changed = msgspec.structs.replace(row, paused=True, problem=str(error))
        return Change({row.name: changed})
    if not instants and not missed:
        return NO_CHANGE
    skipped = 0
    if instants and _overlaps(row, unfinished):
        instants, skipped = [], len(instants)
    tasks = [_task(row.schedule, instant, now) for instant in instants]
    changed = msgspec.structs.replace(
        row,
        next=following,
        last=instants[-1] if instants else row.last,
        recent=[*(id_ for id_ in row.recent if id_ in unfinished), *(task.id for task in tasks)][-MOST_CAUGHT_UP:],
        missed=row.missed + missed,
        skipped=row.skipped + skipped,
    )
    return Change({row.name: changed}, tasks)


def steps(row: ScheduleRow, change: Change) -> Iterator[tuple[ScheduleRow, Envelope]]:
    """The tasks of a row's change one by one, each with the row as it is when that is stored.

    For who can store one task with one row: a program that ends in between leaves the next one due.
    """
    final = change.rows[row.name]
    assert final is not None
    for place, task in enumerate(change.tasks):
        later = change.tasks[place + 1 :]
        if not later:
            yield final, task
            return
        following = scheduled_for(later[0].headers)
        this = scheduled_for(task.headers)
        assert following is not None
        assert this is not None
        recent = final.recent[: len(final.recent) - len(later)]
        yield (
            msgspec.structs.replace(final, next=following.timestamp(), last=this.timestamp(), recent=recent),
            task,
        )


def _overlaps(row: ScheduleRow, unfinished: Mapping[str, bool]) -> bool:
    match row.schedule.timing.overlap:
        case "skip":
            return bool(unfinished)
        case "one_waiting":
            return not all(unfinished.values())
        case _:
            return False


def _to_store(name: str, timing: Timing, first: float, now: float) -> tuple[list[float], int]:
    """The instants that get a task now, and how many are missed; of very many the number is not exact."""
    due = _due(name, timing, first, now, MOST_CAUGHT_UP + 1)
    if not due:
        return [], 0
    if len(due) > MOST_CAUGHT_UP and timing.catch_up != "all":
        late = len(due)
        due = _last(name, timing, first, now)
    else:
        late = 0
    grace = timing.grace
    kept = [one for one in due if now - timing.due(name, one) <= ON_TIME]
    made_up = [one for one in due if one not in kept and (grace is None or now - timing.due(name, one) <= grace)]
    if timing.catch_up == "none" and grace is None:
        made_up = []
    elif timing.catch_up == "latest":
        made_up = [] if kept else made_up[-1:]
    stored = [*made_up, *kept][:MOST_CAUGHT_UP]
    return stored, late + len(due) - len(stored)


def _due(name: str, timing: Timing, first: float, now: float, most: int) -> list[float]:
    """The first instants from ``first`` on that are due by now."""
    found = [first] if timing.due(name, first) <= now else []
    for instant in islice(timing.instants(first), most - len(found)) if found else ():
        if timing.due(name, instant) > now:
            break
        found.append(instant)
    return found


def _last(name: str, timing: Timing, first: float, now: float) -> list[float]:
    """The last instants that are due by now, where there are too many to look at each."""
    step = _FIRST_STEP
    while True:
        start = max(first, now - timing.jitter - step)
        found = [one for one in _until(timing, start, now) if timing.due(name, one) <= now]
        if found or start == first:
            return found or [first]
        step *= 4


def _following(name: str, timing: Timing, first: float, now: float) -> float | None:
    """The first instant that is not due by now; with jitter it may have passed."""
    start = max(first - 0.001, now - timing.jitter - 1.0)
    return next((one for one in timing.instants(start) if timing.due(name, one) > now), None)


def _until(timing: Timing, after: float, now: float) -> list[float]:
    found = []
    for instant in timing.instants(after):
        if instant > now:
            break
        found.append(instant)
    return found


def _task(schedule: Schedule, instant: float, now: float, suffix: str = "") -> Envelope:
    message = schedule.message
    return msgspec.structs.replace(
        message,
        id=f"{schedule.name}@{moment_text(instant)}{suffix}",
        enqueued_at=now,
        expires_at=None if message.expires_at is None else now + message.expires_at,
        headers={**message.headers, SCHEDULE: schedule.name, SCHEDULED_FOR: _rfc3339(instant)},
    )


def _rfc3339(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).isoformat().replace("+00:00", "Z")


def scheduled_for(headers: Mapping[str, object]) -> datetime | None:
    """The instant of a scheduled task; None: it is none, or its header is no moment."""
    value = headers.get(SCHEDULED_FOR)
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if found is not None and found.tzinfo is not None else None


def _put(schedule: Schedule, row: ScheduleRow | None, now: float) -> Change:
    if row is None:
        return Change({schedule.name: ScheduleRow(schedule, _after(schedule, now))})
    if not row.rests(now):
        _refuse_of_code(row, "give this one another name, or change it there")
    changed = _redefined(row, schedule, now)
    return Change({schedule.name: changed}) if changed != row else NO_CHANGE


def _redefined(row: ScheduleRow, schedule: Schedule, now: float) -> ScheduleRow:
    """The row with another definition; it keeps what it knows of its past."""
    following = row.next if schedule.timing == row.schedule.timing else _after(schedule, now)
    return msgspec.structs.replace(row, schedule=schedule, next=following)


def _after(schedule: Schedule, now: float) -> float | None:
    return schedule.timing.after(now)


def _declared(request: Declare, rows: Mapping[str, ScheduleRow], now: float) -> Change:
    mine = [row for row in rows.values() if row.schedule.origin == request.origin]
    is_newest = all(row.started <= request.started or row.rests(now) for row in mine)
    changed: dict[str, ScheduleRow | None] = {}
    outdated = []
    for schedule in request.schedules:
        row = rows.get(schedule.name)
        if row is not None and row.schedule == schedule:
            if row.is_to_be_declared(request.started, now):
                started = max(row.started, request.started)
                changed[schedule.name] = msgspec.structs.replace(row, started=started, declared=now)
        elif is_newest and (row is None or _gives_way(row, request, now)):
            fresh = _declared_row(row, schedule, now)
            changed[schedule.name] = msgspec.structs.replace(fresh, started=request.started, declared=now)
        else:
            outdated.append(schedule.name)
    if is_newest:
        names = {schedule.name for schedule in request.schedules}
        changed |= dict.fromkeys(row.name for row in mine if row.name not in names)
    return Change(changed, outdated=outdated)


def _declared_row(row: ScheduleRow | None, schedule: Schedule, now: float) -> ScheduleRow:
    """Paused where this program cannot tell when it comes: another one has a zone that is not known here."""
    try:
        return ScheduleRow(schedule, _after(schedule, now)) if row is None else _redefined(row, schedule, now)
    except ConfigurationError as error:
        return ScheduleRow(schedule, None, paused=True, problem=str(error))


def _gives_way(row: ScheduleRow, request: Declare, now: float) -> bool:
    """Whether another definition takes its place: it is of the code too, and older, or nobody declares it any more."""
    return row.schedule.origin is not None and (row.started <= request.started or row.rests(now))


def _refuse_of_code(row: ScheduleRow, remedy: str) -> None:
    if row.schedule.origin is not None:
        raise ConfigurationError(
            f"schedule {row.name!r} is in the code of {row.schedule.origin!r}, whose workers declare it: {remedy}"
        )


def _one(request: Remove | Pause | Resume | Trigger, row: ScheduleRow, now: float) -> Change:
    match request:
        case Remove():
            if not row.rests(now):
                _refuse_of_code(row, "remove it there, or pause it")
            return Change({row.name: None})
        case Pause():
            return Change({row.name: msgspec.structs.replace(row, paused=True, problem="")})
        case Resume():
            following = _after(row.schedule, now)
            return Change({row.name: msgspec.structs.replace(row, paused=False, problem="", next=following)})
        case Trigger(_, at):
            if request.id in row.recent:
                return NO_CHANGE  # asked again by who had no answer
            task = _task(row.schedule, at, now)
            recent = [*row.recent, task.id][-MOST_CAUGHT_UP:]
            return Change({row.name: msgspec.structs.replace(row, recent=recent)}, [task])
