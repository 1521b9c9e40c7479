"""What a program knows by itself of tasks that it enqueued while it read the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Raw

from leveret.brokers.rabbitmq.statuses import recent
from leveret.brokers.rabbitmq.statuses.recent import Recent
from leveret.brokers.rabbitmq.statuses.streams import Batch, to_message
from leveret.model import Envelope, Succeeded, new_id
from leveret.model.status import enqueued, settled, started

if TYPE_CHECKING:
    import pytest


def task(id_: str = "") -> Envelope:
    return Envelope(id_ or new_id(), "work", "say", b"{}", enqueued_at=1.0)


def said(*envelopes: Envelope) -> bytes:
    return to_message("s", Batch(updates=[started(one, "say", 2.0) for one in envelopes])).body


class Reading(Recent):
    """Offsets are as the stream counts, from where it was when the reading began."""

    offset = 100

    def hear(self, *envelopes: Envelope) -> None:
        self.offset += 3
        self.take(self.offset, said(*envelopes))


def states(lately: Recent, *envelopes: Envelope) -> list[str] | None:
    known = lately.known([one.id for one in envelopes])
    return None if known is None else [status.state for status in known]


def test_what_was_said_since_it_was_stored_is_known() -> None:
    lately, mine, others = Reading(), task(), task()
    lately.begin()
    lately.hear(others)
    mark = lately.mark
    lately.hear(mine, others)  # a worker may be faster than the confirmation
    lately.note_stored([mine], mark)
    assert states(lately, mine) == ["running"]
    assert states(lately, others) is None
    assert states(lately, mine, others) is None, "one of them must be asked for"
    assert lately.known([]) is None


def test_what_nobody_has_said_anything_of_is_queued() -> None:
    lately, mine = Reading(), task()
    lately.begin()
    lately.note_stored([mine], lately.mark)
    (known,) = lately.known([mine.id]) or []
    assert known == enqueued(mine, 1.0)


def test_what_was_stored_while_nobody_listened_is_asked_for() -> None:
    lately, mine = Reading(), task()
    assert lately.mark is None
    lately.note_stored([mine], None)
    lately.begin()
    assert states(lately, mine) is None


def test_what_was_missed_is_asked_for() -> None:
    """Its enqueue began before the connection was lost, and ended afterwards; or both were before."""
    lately, mine, other = Reading(), task(), task()
    lately.begin()
    mark = lately.mark
    lately.note_stored([other], mark)
    lately.end()
    assert states(lately, other) is None
    lately.begin()
    lately.note_stored([mine], mark)
    assert states(lately, mine) is None
    lately.note_stored([mine], lately.mark)
    assert states(lately, mine) == ["queued"]


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_MOST_BYTES", 2_000)
    monkeypatch.setattr(recent, "_MOST_TASKS", 3)
    lately, mine, late = Reading(), task(), task()
    lately.begin()
    lately.note_stored([mine], lately.mark)
    for _ in range(100):
        lately.hear(task())
    assert states(lately, mine) is None, "something may have been said of it that is not kept"
    lately.note_stored([late], lately.mark)
    lately.hear(late)
    assert states(lately, late) == ["running"]
    lately.note_stored([task() for _ in range(3)], lately.mark)
    assert states(lately, late) is None


def test_what_was_found_is_known_from_there_on() -> None:
    lately, found, early, unheard = Reading(), task(), task(), task()
    lately.begin()
    lately.hear(early)
    mark = lately.mark
    lately.hear(found)
    lately.note_found([enqueued(found, 1.0)], lately.offset, mark)
    assert states(lately, found) == ["queued"], "what came before is in what was found"
    lately.hear(found)
    assert states(lately, found) == ["running"]
    lately.note_found([enqueued(early, 1.0)], lately.offset - 50, mark)
    assert states(lately, early) is None, "it was not read up to what is heard here"
    lately.note_found([enqueued(unheard, 1.0)], 90, None)
    assert states(lately, unheard) is None


def test_large_tasks_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "_MOST_BYTES", 1_000)
    lately = Reading()
    lately.begin()
    tasks = [Envelope(new_id(), "work", "say", b"x" * 300, enqueued_at=1.0) for _ in range(10)]
    for one in [*tasks, *tasks[-3:]]:
        lately.note_stored([one], lately.mark)
    assert [one for one in tasks if states(lately, one)] == tasks[-3:]
    result = settled(tasks[-1], "say", Succeeded(Raw(b'"' + b"x" * 600 + b'"')), 2.0)
    lately.note_found([result], 200, lately.mark)
    assert [one for one in tasks if states(lately, one)] == tasks[-1:]
