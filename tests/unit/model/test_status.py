"""How updates of a task add up, in whatever order they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from leveret.model import Cancelled, DeadLetter, DeadLettered, Envelope, Released, Retrying, Succeeded
from leveret.model.status import (
    MOST_BODY,
    CancelRequest,
    Moment,
    Progress,
    Status,
    back,
    cancelled_before,
    cancelled_running,
    enqueued,
    newer,
    placed,
    purged,
    revived_again,
    settled,
    started,
    still,
)

if TYPE_CHECKING:
    from collections.abc import Callable

TASK = Envelope("1", "work", "say", b"{}", enqueued_at=100.0)


def told(*updates: Status) -> Status:
    known = None
    for update in updates:
        known = newer(known, update)
    assert known is not None
    return known


def test_a_life() -> None:
    """Each part is kept that a later update does not say, and what was before becomes history."""
    first = enqueued(TASK, 100.0)
    running = started(TASK, "say", 101.0)
    halfway = msgspec.structs.replace(running, at=102.0, progress=Progress(1, 2))
    failed = settled(TASK, "say", Retrying("broke", "tb", delay=5.0), 103.0)
    again = msgspec.structs.replace(TASK, attempt=2, last_error="broke")
    status = told(first, running, halfway)
    assert (status.state, status.started_at, status.progress) == ("running", 101.0, Progress(1, 2))
    status = newer(status, failed)
    assert (status.state, status.attempt, status.due, status.error) == ("retrying", 2, 108.0, "broke")
    assert (status.progress, status.started_at) == (None, None)
    status = told(status, started(again, "say", 108.0), settled(again, "say", Succeeded(b"7"), 109.0))
    assert (status.state, bytes(status.encoded_result), status.started_at, status.enqueued_at) == (
        "succeeded",
        b"7",
        108.0,
        100.0,
    )
    assert status.history == [
        Moment(100.0, "queued", 1),
        Moment(101.0, "running", 1),
        Moment(103.0, "retrying", 2, "broke"),
        Moment(108.0, "running", 2),
    ]


@pytest.mark.parametrize(
    ("outcome", "state", "error"),
    [
        (DeadLettered("gone", "tb"), "dead", "gone"),
        (Cancelled("cancelled while it ran"), "cancelled", "cancelled while it ran"),
        (Released(), "queued", None),
        (Succeeded(), "succeeded", None),
    ],
)
def test_outcomes(outcome: DeadLettered | Cancelled | Released | Succeeded, state: str, error: str | None) -> None:
    status = settled(TASK, "say", outcome, 1.0)
    assert (status.state, status.error, status.has_result) == (state, error, False)


def test_the_producers_word_may_come_late() -> None:
    """It changes nothing then, unless it tells of another task with the same id."""
    done = told(started(TASK, "say", 101.0), settled(TASK, "say", Succeeded(), 102.0))
    assert newer(done, enqueued(TASK, 103.0)) == done
    another = enqueued(msgspec.structs.replace(TASK, enqueued_at=200.0), 200.0)
    assert newer(done, another) == another


def test_a_workers_older_word_may_come_late() -> None:
    done = told(started(TASK, "say", 101.0), settled(TASK, "say", Succeeded(), 102.0))
    assert newer(done, started(TASK, "say", 101.5)) == done
    elsewhere = msgspec.structs.replace(started(TASK, "say", 101.5), worker="other:1")
    assert newer(done, elsewhere) == done
    again = msgspec.structs.replace(elsewhere, at=103.0)
    assert newer(done, again).state == "running"


def test_an_id_that_is_used_again_is_another_task() -> None:
    """Nothing of the old one is kept, whoever is the first to tell of the new one. A revived task is the same."""
    done = told(
        msgspec.structs.replace(started(TASK, "say", 101.0), progress=Progress(1, 2)),
        settled(TASK, "say", DeadLettered("gone"), 102.0),
    )
    another = msgspec.structs.replace(TASK, enqueued_at=200.0)
    for update in (started(another, "say", 201.0), settled(another, "say", Succeeded(), 202.0)):
        assert newer(done, update) == update
    again = told(done, revived_again(done, 200.0), started(another, "say", 201.0))
    assert again.enqueued_at == 100.0
    assert [moment.state for moment in again.history] == ["running", "dead", "queued"]
    done_again = newer(again, settled(another, "say", Succeeded(), 202.0))
    assert newer(done_again, started(another, "say", 201.5)) == done_again


def test_a_delayed_task_has_its_time() -> None:
    delayed = msgspec.structs.replace(TASK, due=500.0)
    assert (enqueued(delayed, 100.0).state, enqueued(delayed, 100.0).due) == ("delayed", 500.0)
    assert enqueued(delayed, 501.0).state == "queued"


def test_where_the_broker_has_it_counts() -> None:
    row, running = enqueued(TASK, 100.0), started(TASK, "say", 101.0)
    done, dead = settled(TASK, "say", Succeeded(), 102.0), settled(TASK, "say", DeadLettered("gone"), 102.0)
    assert placed(None, row) == row
    assert placed(done, None) == done
    known = placed(running, row)
    assert known is not None
    assert known.state == "queued"  # its worker died before it could say so
    assert placed(done, row) == row  # an id that is used again
    buried = msgspec.structs.replace(row, state="dead", error="gone")
    assert placed(dead, buried) == dead
    assert placed(running, buried) == buried
    delayed = enqueued(msgspec.structs.replace(TASK, due=500.0), 100.0)
    assert placed(delayed, delayed) == delayed
    for due in (row, msgspec.structs.replace(row, state="running")):
        known = placed(delayed, due)
        assert known is not None
        assert (known.state, known.due) == ("queued", None)
    held = msgspec.structs.replace(row, state="running")
    assert placed(running, held) == running
    for nothing in (None, done):
        waits = placed(nothing, held)
        assert waits is not None
        assert waits.state == "queued"  # in the backlog of a worker


def test_what_is_said_of_a_status() -> None:
    status = told(started(TASK, "say", 101.0), settled(TASK, "say", DeadLettered("gone", "tb"), 102.0))
    revived = revived_again(status, 103.0)
    assert (revived.state, revived.attempt, revived.traceback) == ("queued", 1, "")
    assert (back(status, 103.0).state, back(status, 103.0).worker) == ("queued", None)
    assert (cancelled_before(status, 103.0).state, cancelled_before(status, 103.0).error) == (
        "cancelled",
        "cancelled before it ran",
    )


def test_a_mark_covers_what_was_enqueued_before_it() -> None:
    mark = CancelRequest("1", 150.0)
    assert mark.covers(TASK)
    assert mark.covers(msgspec.structs.replace(TASK, enqueued_at=None))
    assert not mark.covers(msgspec.structs.replace(TASK, enqueued_at=151.0))


@pytest.mark.parametrize(("body", "kept"), [(b"{}" * 10, b"{}" * 10), (b" " * (MOST_BODY + 1), None)])
def test_a_call_is_kept_with_the_status_unless_it_is_long(body: bytes, kept: bytes | None) -> None:
    envelope = msgspec.structs.replace(TASK, body=body)
    for update in (enqueued(envelope, 1.0), started(envelope, "say", 2.0), settled(envelope, "say", Succeeded(), 3.0)):
        assert update.body == kept
    ended = newer(started(envelope, "say", 2.0), msgspec.structs.replace(started(TASK, "say", 3.0), body=None))
    assert ended.body == kept


def test_a_status_is_one_readable_line() -> None:
    """As a REPL shows it; its result is there as what it is."""
    envelope = Envelope("01a2", "mail", "send", b"x" * 2_000, attempt=2, enqueued_at=1.0)
    done = settled(envelope, "send", Succeeded(b'{"sent": [1, 2]}'), 1_700_000_000.0)
    assert done.result == {"sent": [1, 2]}
    shown = repr(done)
    assert "\n" not in shown
    assert len(shown) < 300
    for part in (
        "id='01a2'",
        "state='succeeded'",
        "task='send'",
        "attempt=2",
        "at='2023-11-1",
        "result={'sent': [1, 2]}",
    ):
        assert part in shown
    failed = settled(envelope, "send", DeadLettered("why " * 500, "Traceback\n" * 500), 1_700_000_000.0)
    assert failed.result is None
    assert "state='dead'" in repr(failed)
    assert "Traceback" not in repr(failed)
    assert len(repr(failed)) < 400
    letter = DeadLetter(envelope, "why " * 500, "Traceback\n" * 500, 1_700_000_000.0)
    assert len(repr(letter)) < 500


@pytest.mark.parametrize("update", [back, revived_again, still, cancelled_before, purged, cancelled_running])
def test_an_update_has_no_history(update: Callable[[Status, float], Status]) -> None:
    """Whoever reads puts it together; the wire format has none."""
    known = Status("1", "delayed", 1.0, "work", history=[Moment(0.5, "queued", 1)], first=True)
    told = update(known, 2.0)
    assert (told.history, told.first) == ([], False)
