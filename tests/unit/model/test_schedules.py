"""What becomes of a schedule: when it falls due, and when somebody asks something of it."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import ConfigurationError, cron, every
from leveret.model import (
    Declare,
    Envelope,
    Pause,
    Put,
    Remove,
    Resume,
    Schedule,
    ScheduleRow,
    Trigger,
    advance,
    asked,
    check_schedule_name,
    scheduled_for,
    steps,
)
from leveret.model.schedules import DECLARED_FOR
from leveret.model.timing import MOST_CAUGHT_UP

if TYPE_CHECKING:
    from leveret.model import Change, Cron, Every

#: A full hour.
START = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
FIVE = 300.0
MESSAGE = Envelope("", "work", "report", b'{"args":[],"kwargs":{}}')


def schedule(timing: Cron | Every | None = None, **more: Any) -> Schedule:
    return Schedule("report", timing or every(FIVE), MESSAGE, **more)


def row(timing: Cron | Every | None = None, **more: Any) -> ScheduleRow:
    return ScheduleRow(schedule(timing), **{"next": START, **more})


def due(before: ScheduleRow, now: float, **unfinished: bool) -> tuple[list[str], ScheduleRow]:
    change = advance(before, now, {id_.replace("_", "@"): is_running for id_, is_running in unfinished.items()})
    after = change.rows.get(before.name, before)
    assert after is not None
    return [task.id for task in change.tasks], after


def names(*minutes: int) -> list[str]:
    return [f"report@20260301T12{minute:02d}00Z" for minute in minutes]


# When it falls due


def test_a_task_is_stored_at_its_instant_and_not_before() -> None:
    assert due(row(), START - 0.001)[0] == []
    tasks, after = due(row(), START)
    assert tasks == names(0)
    assert (after.last, after.next, after.missed) == (START, START + FIVE, 0)
    assert due(after, START + 1)[0] == []


def test_a_task_knows_its_instant_however_late_it_is() -> None:
    (task,) = advance(row(), START + 1.5, {}).tasks
    assert scheduled_for(task.headers) == datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert task.enqueued_at == START + 1.5
    assert (task.queue, task.task, task.body) == ("work", "report", MESSAGE.body)


def test_what_it_may_wait_counts_from_its_storing() -> None:
    message = msgspec.structs.replace(MESSAGE, expires_at=60.0)
    (task,) = advance(ScheduleRow(Schedule("report", every(FIVE), message), START), START + 1, {}).tasks
    assert task.expires_at == START + 61


@pytest.mark.parametrize(
    ("catch_up", "stored", "missed"),
    [("none", [], 12), ("latest", names(59 - 4), 11), ("all", names(*range(0, 60, 5)), 0)],
)
def test_an_hour_without_a_worker(catch_up: Any, stored: list[str], missed: int) -> None:
    """Of a schedule of five minutes none, one or twelve."""
    tasks, after = due(row(every(FIVE, catch_up=catch_up)), START + 59 * 60)
    assert tasks == stored
    assert (after.missed, after.next) == (missed, START + 3600)


def test_what_is_hardly_late_is_on_time() -> None:
    """A worker dies and another one takes over: that is no outage."""
    second = row(every(1, catch_up="none"))
    assert len(due(second, START + 1.9)[0]) == 2
    assert due(row(every(1, catch_up="latest")), START + 1.9)[0] == [
        "report@20260301T120000Z",
        "report@20260301T120001Z",
    ]


def test_grace_is_how_late_it_may_be_made_up_for() -> None:
    assert due(row(every(FIVE, catch_up="all", grace=600)), START + 59 * 60)[0] == names(50, 55)
    assert due(row(every(FIVE, catch_up="latest", grace=60)), START + 59 * 60)[0] == []
    assert due(row(every(FIVE, catch_up="none", grace=300)), START + 59 * 60)[0] == names(55)


def test_a_year_without_a_worker_is_over_at_once() -> None:
    year = 366 * 86_400
    tasks, after = due(row(every(1)), START + year + 0.5)
    assert len(tasks) <= 3
    assert after.next == START + year + 1
    tasks, after = due(row(every(1, catch_up="all")), START + year)
    assert len(tasks) == MOST_CAUGHT_UP
    assert after.next == START + year + 1
    tasks, after = due(row(cron("*/5 * * * *", catch_up="latest")), START + year + 60)
    assert (len(tasks), after.next) == (1, START + year + FIVE)


def test_a_clock_that_steps_back_fires_nothing_twice() -> None:
    _, after = due(row(), START)
    assert due(after, START - 3600)[0] == []
    assert due(after, START + FIVE)[0] == names(5)


def test_a_task_with_jitter_is_stored_later_and_at_its_own_instant() -> None:
    timing = every(FIVE, jitter=200)
    moment = timing.due("report", START)
    assert START < moment < START + 200
    assert due(row(timing), moment - 0.01)[0] == []
    tasks, after = due(row(timing), moment)
    assert (tasks, after.next) == (names(0), START + FIVE)


def test_a_schedule_that_ends() -> None:
    """Its instants are over: nothing comes, and nothing fails."""
    after = due(ScheduleRow(schedule(), None), START)[1]
    assert (after.next, after.due) == (None, None)


@pytest.mark.parametrize(
    ("overlap", "unfinished", "stored"),
    [
        ("skip", {}, 1),
        ("skip", {"report_1": True}, 0),
        ("skip", {"report_1": False}, 0),
        ("allow", {}, 1),
        ("one_waiting", {"report_1": True}, 1),
        ("one_waiting", {"report_1": False}, 0),
        ("one_waiting", {"report_1": True, "report_2": False}, 0),
    ],
)
def test_what_would_overlap(overlap: Any, unfinished: dict[str, bool], stored: int) -> None:
    before = row(every(FIVE, overlap=overlap), recent=["report@1", "report@2"])
    tasks, after = due(before, START, **unfinished)
    assert len(tasks) == stored
    assert after.skipped == 1 - stored
    assert after.next == START + FIVE
    assert after.recent == [*(id_.replace("_", "@") for id_ in unfinished), *tasks]


def test_a_zone_that_is_not_known_any_more_pauses_it_with_the_reason() -> None:
    timing = msgspec.structs.replace(cron("0 12 * * *"), tz="Mars/Base")
    after = due(row(timing), START)[1]
    assert after.paused
    assert "Mars/Base" in after.problem
    assert after.due is None


def test_paused_or_without_its_application_it_rests() -> None:
    assert due(row(paused=True), START)[0] == []
    of_code = ScheduleRow(schedule(origin="tasks:app"), START, declared=START - DECLARED_FOR)
    assert due(of_code, START)[0] == names(0)
    assert due(of_code, START + 1)[0] == []


def test_tasks_one_by_one_each_with_its_row() -> None:
    before = row(every(FIVE, catch_up="all"), recent=["report@1"])
    change = advance(before, START + 11 * 60, {"report@1": True})
    assert not change.tasks
    before = row(every(FIVE, catch_up="all", overlap="allow"))
    change = advance(before, START + 11 * 60, {})
    found = list(steps(before, change))
    assert [(step.next, step.last, task.id) for step, task in found] == [
        (START + FIVE, START, names(0)[0]),
        (START + 2 * FIVE, START + FIVE, names(5)[0]),
        (START + 3 * FIVE, START + 2 * FIVE, names(10)[0]),
    ]
    # Whoever goes on with the row of the first has the others due.
    assert due(found[0][0], START + 11 * 60)[0] == names(5, 10)


# When somebody asks


def rows_after(change: Change | None, *before: ScheduleRow) -> dict[str, ScheduleRow]:
    assert change is not None
    rows = {one.name: one for one in before}
    for name, one in change.rows.items():
        rows.pop(name, None)
        if one is not None:
            rows[name] = one
    return rows


def test_a_schedule_of_data_is_put_and_put_again() -> None:
    first = rows_after(asked(Put(schedule()), {}, START + 1))["report"]
    assert (first.next, first.last) == (START + FIVE, None)
    fired = due(first, START + FIVE)[1]
    other = schedule(every(60))
    second = rows_after(asked(Put(other), {"report": fired}, START + FIVE + 1), fired)["report"]
    assert (second.schedule, second.last, second.next) == (other, START + FIVE, START + FIVE + 60)
    again = asked(Put(other), {"report": second}, START + FIVE + 2)
    assert again is not None
    assert not again.rows


def test_pause_resume_trigger_and_remove() -> None:
    known = {"report": row(last=START - FIVE)}
    paused = rows_after(asked(Pause("report"), known, START))["report"]
    assert (paused.paused, paused.due) == (True, None)
    resumed = rows_after(asked(Resume("report"), {"report": paused}, START + 3600.5))["report"]
    assert (resumed.paused, resumed.next) == (False, START + 3600 + FIVE)
    change = asked(Trigger("report", START + 1.5), known, START + 1.6)
    assert change is not None
    assert [task.id for task in change.tasks] == ["report@20260301T120001.500Z"]
    assert (rows_after(change)["report"].next, rows_after(change)["report"].last) == (START, START - FIVE)
    assert rows_after(asked(Remove("report"), known, START), *known.values()) == {}


@pytest.mark.parametrize("request_", [Remove("no"), Pause("no"), Resume("no"), Trigger("no", 1.0)])
def test_what_is_asked_of_a_schedule_that_is_not_there(request_: Any) -> None:
    assert asked(request_, {}, START) is None


ORIGIN = "tasks:app"


def of_code(timing: Cron | Every | None = None, name: str = "report") -> Schedule:
    return msgspec.structs.replace(schedule(timing, origin=ORIGIN), name=name)


def declare(*schedules: Schedule, started: float = START) -> Declare:
    return Declare(ORIGIN, started, list(schedules))


def test_the_codes_schedules_come_and_go_with_it() -> None:
    rows = rows_after(asked(declare(of_code(), of_code(name="other")), {}, START))
    assert sorted(rows) == ["other", "report"]
    newer = asked(declare(of_code(), started=START + 10), rows, START + 10)
    assert sorted(rows_after(newer, *rows.values())) == ["report"]


def test_an_older_programs_word_counts_where_it_says_the_same() -> None:
    """A rolling deployment: the new release's schedules are in force, and the old one's workers keep them alive."""
    newer = rows_after(asked(declare(of_code(every(60)), started=START + 10), {}, START + 10))
    older = asked(declare(of_code(), of_code(name="gone"), started=START), newer, START + 20)
    assert older is not None
    assert (dict(older.rows), list(older.outdated)) == ({}, ["report", "gone"])
    same = asked(declare(of_code(every(60)), started=START), newer, START + 50)
    assert rows_after(same)["report"].declared == START + 50
    # When the newer one's programs are gone for good, the older one is in force again.
    late = START + 10 + DECLARED_FOR + 1
    assert rows_after(asked(declare(of_code(), started=START), newer, late))["report"].schedule == of_code()


def test_that_it_is_there_is_written_now_and_then_alone() -> None:
    rows = rows_after(asked(declare(of_code()), {}, START))
    again = asked(declare(of_code()), rows, START + 5)
    assert again is not None
    assert not again.rows
    # Each word is a row's change: two in the time after which a schedule rests are enough.
    soon = asked(declare(of_code()), rows, START + DECLARED_FOR / 2)
    assert soon is not None
    assert not soon.rows
    later = asked(declare(of_code()), rows, START + DECLARED_FOR / 2 + 1)
    assert rows_after(later)["report"].declared == START + DECLARED_FOR / 2 + 1


def test_a_changed_expression_keeps_the_last_run_and_a_pause() -> None:
    before = ScheduleRow(of_code(), START + FIVE, last=START, paused=True, started=START, declared=START)
    after = rows_after(asked(declare(of_code(every(60)), started=START + 1), {"report": before}, START + 1))["report"]
    assert (after.last, after.paused, after.next) == (START, True, START + 60)


def test_code_and_data_do_not_take_each_others_names() -> None:
    data = rows_after(asked(Put(schedule()), {}, START))
    change = asked(declare(of_code(every(60))), data, START)
    assert change is not None
    assert (dict(change.rows), list(change.outdated)) == ({}, ["report"])
    code = rows_after(asked(declare(of_code()), {}, START))
    for request in (Put(schedule(every(60))), Remove("report")):
        with pytest.raises(ConfigurationError, match="'report' is in the code of 'tasks:app'"):
            asked(request, code, START + 1)
    # What no worker declares any more can be removed.
    assert rows_after(asked(Remove("report"), code, START + DECLARED_FOR + 1), *code.values()) == {}


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 300, 5, None])
def test_a_name_must_fit_the_ids_of_its_tasks(name: object) -> None:
    with pytest.raises(ConfigurationError, match=r"schedule name .* must be printable text of 1 to"):
        check_schedule_name(name)


def test_a_header_that_is_no_moment_is_none() -> None:
    for value in (None, 5, "soon", "2026-03-01T12:00:00", math.inf):
        assert scheduled_for({"leveret-scheduled-for": value}) is None
