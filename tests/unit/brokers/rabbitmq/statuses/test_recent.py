"""What a program knows by itself of tasks that it enqueued while it read the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.statuses import recent
from leveret.brokers.rabbitmq.statuses.recent import Recent
from leveret.brokers.rabbitmq.statuses.streams import Batch, to_message
from leveret.model import Envelope, new_id
from leveret.model.status import enqueued, started

if TYPE_CHECKING:
    import pytest


def task(id_: str = "") -> Envelope:
    return Envelope(id_ or new_id(), "work", "say", b"{}", enqueued_at=1.0)


def said(*envelopes: Envelope) -> bytes:
    return to_message("s", Batch(updates=[started(one, "say", 2.0) for one in envelopes])).body


def states(lately: Recent, *envelopes: Envelope) -> list[str] | None:
    known = lately.known([one.id for one in envelopes])
    return None if known is None else [status.state for status in known]


def test_what_was_said_since_it_was_stored_is_known() -> None:
    lately, mine, others = Recent(), task(), task()
    lately.begin()
    lately.take(said(others))
    mark = lately.mark
    lately.take(said(mine, others))  # a worker may be faster than the confirmation
    lately.note([mine], mark)
    assert states(lately, mine) == ["running"]
    assert states(lately, others) is None
    assert states(lately, mine, others) is None, "one of them must be asked for"
    assert lately.known([]) is None


def test_what_nobody_has_said_anything_of_is_queued() -> None:
    lately, mine = Recent(), task()
    lately.begin()
    lately.note([mine], lately.mark)
    (known,) = lately.known([mine.id]) or []
    assert known == enqueued(mine, 1.0)


def test_what_was_stored_while_nobody_listened_is_asked_for() -> None:
    lately, mine = Recent(), task()
    assert lately.mark is None
    lately.note([mine], None)
    lately.begin()
    assert states(lately, mine) is None


def test_what_was_missed_is_asked_for() -> None:
    """Its enqueue began before the connection was lost, and ended afterwards; or both were before."""
    lately, mine, other = Recent(), task(), task()
    lately.begin()
    mark = lately.mark
    lately.note([other], mark)
    lately.end()
    assert states(lately, other) is None
    lately.begin()
    lately.note([mine], mark)
    assert states(lately, mine) is None
    lately.note([mine], lately.mark)
    assert states(lately, mine) == ["queued"]


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_MOST_BYTES", 2_000)
    monkeypatch.setattr(recent, "_MOST_TASKS", 3)
    lately, mine, late = Recent(), task(), task()
    lately.begin()
    lately.note([mine], lately.mark)
    for _ in range(100):
        lately.take(said(task()))
    assert states(lately, mine) is None, "something may have been said of it that is not kept"
    lately.note([late], lately.mark)
    lately.take(said(late))
    assert states(lately, late) == ["running"]
    lately.note([task() for _ in range(3)], lately.mark)
    assert states(lately, late) is None
