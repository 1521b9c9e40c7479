"""What is on the way on one channel: without a transport, with the server's answers given by hand."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest
from pamqp import body, frame

from leveret import App
from leveret.brokers.rabbitmq.amqp import confirm_channel as module
from leveret.brokers.rabbitmq.amqp.confirm_channel import BOUNDED, OUTSTANDING, SILENCE, ConfirmTracker, Limits
from leveret.brokers.rabbitmq.amqp.message import Encoder
from leveret.brokers.rabbitmq.queues.codec import fitted, to_message
from leveret.errors import QueueFull, QueueNotFound
from leveret.model import Envelope, new_id

if TYPE_CHECKING:
    from types import FrameType

    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.brokers.rabbitmq.amqp.confirm_channel import PublishCall


class Channel:
    """A tracker, and what it wrote."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.is_clogged = False
        self.unsent = 0
        self.limits = Limits()
        self.tracker = ConfirmTracker(
            Encoder(1, 0, fitted), self.writes.append, lambda: self.is_clogged, lambda: self.unsent, self.limits
        )

    @property
    def bodies(self) -> list[list[str]]:
        """The bodies of each write."""
        return [list(_bodies(write)) for write in self.writes]

    @property
    def sent(self) -> list[str]:
        return [one for write in self.bodies for one in write]


def _bodies(data: bytes) -> list[str]:
    found = []
    while data:
        consumed, _, part = frame.unmarshal(data)
        data = data[consumed:]
        if isinstance(part, body.ContentBody):
            found.append(part.value.decode())
    return found


def message(text: str, id_: str | None = None) -> Message:
    return to_message(Envelope(id_ or new_id(), "work", "say", text.encode(), enqueued_at=1.0))


def many(count: int) -> list[Message]:
    return [message(str(number)) for number in range(count)]


async def turn() -> None:
    """What was scheduled until now is done."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def texts(call: PublishCall) -> list[str]:
    return [one.body.decode() for one in call.unstored]


async def test_the_calls_of_one_turn_are_one_write() -> None:
    channel = Channel()
    calls = [channel.tracker.post([message(text)]) for text in "abc"]
    await turn()
    assert channel.bodies == [["a", "b", "c"]]
    channel.tracker.confirmed(3, multiple=True)
    await asyncio.gather(*(call.done for call in calls))
    assert not any(map(texts, calls))


async def test_each_message_waits_for_its_own_confirm() -> None:
    channel = Channel()
    first, second = channel.tracker.post(many(3)), channel.tracker.post([message("other")])
    await turn()
    channel.tracker.confirmed(2, multiple=False)
    channel.tracker.confirmed(4, multiple=False)
    await second.done
    assert texts(first) == ["0", "2"]
    channel.tracker.confirmed(2, multiple=True)
    channel.tracker.confirmed(9, multiple=False)  # of nothing that was sent
    assert texts(first) == ["2"]
    assert not first.done.done()
    channel.tracker.confirmed(3, multiple=True)
    await first.done
    assert not first.refusals


async def test_refused_messages_are_told_from_stored_ones() -> None:
    channel = Channel()
    call = channel.tracker.post(many(5))
    await turn()
    channel.tracker.confirmed(1, multiple=False)
    channel.tracker.refused(3, multiple=True)
    channel.tracker.refused(5, multiple=False)
    channel.tracker.confirmed(4, multiple=False)
    await call.done
    assert texts(call) == ["1", "2", "4"]
    assert all(isinstance(refusal, QueueFull) for refusal in call.refusals.values())


async def test_a_returned_message_is_not_stored_although_it_is_confirmed() -> None:
    channel = Channel()
    sent = many(3)
    call = channel.tracker.post(sent)
    await turn()
    channel.tracker.returned(sent[1].id)
    channel.tracker.returned("unknown")
    channel.tracker.returned(None)
    channel.tracker.confirmed(3, multiple=True)
    await call.done
    assert texts(call) == ["1"]
    (refusal,) = call.refusals.values()
    assert isinstance(refusal, QueueNotFound)
    assert refusal.ids == (sent[1].id,)


async def test_two_messages_of_one_id_are_not_on_the_way_at_once() -> None:
    """A returned message tells its id alone: it would not be known which of them has no queue."""
    channel = Channel()
    first, second = channel.tracker.post([message("a", "same")]), channel.tracker.post([message("b", "same")])
    await turn()
    assert channel.sent == ["a"]
    channel.tracker.returned("same")
    channel.tracker.confirmed(1, multiple=False)
    await turn()
    assert channel.sent == ["a", "b"]
    channel.tracker.confirmed(2, multiple=False)
    await asyncio.gather(first.done, second.done)
    assert (texts(first), texts(second)) == (["a"], [])


async def test_what_is_on_the_way_is_bounded() -> None:
    channel = Channel()
    call = channel.tracker.post(many(OUTSTANDING + 10))
    await turn()
    assert len(channel.sent) == OUTSTANDING
    channel.tracker.confirmed(4, multiple=True)
    await turn()
    assert len(channel.sent) == OUTSTANDING + 4
    channel.tracker.confirmed(OUTSTANDING + 4, multiple=True)
    await turn()
    channel.tracker.confirmed(OUTSTANDING + 10, multiple=True)
    await call.done
    assert channel.sent == [str(number) for number in range(OUTSTANDING + 10)]


async def test_a_server_that_does_not_read_is_not_sent_more() -> None:
    channel = Channel()
    channel.is_clogged = True
    channel.tracker.post(many(2))
    await turn()
    assert not channel.writes
    channel.is_clogged = False
    channel.tracker.post([message("more")])
    await turn()
    assert channel.sent == ["0", "1", "more"]


async def test_large_bodies_are_written_one_by_one() -> None:
    """So that a server that does not read is noticed before all of them are in memory twice."""
    channel = Channel()
    channel.tracker.post([message("x" * 100_000) for _ in range(5)])
    await turn()
    assert [len(write) for write in channel.bodies] == [1, 1, 1, 1, 1]


async def test_a_small_call_passes_a_large_one() -> None:
    channel = Channel()
    channel.tracker.post(many(OUTSTANDING))
    small = channel.tracker.post([message("small")])
    await turn()
    tag = channel.sent.index("small") + 1
    assert tag < OUTSTANDING / 2
    channel.tracker.confirmed(tag, multiple=False)
    await small.done


async def test_a_cancelled_call_is_not_sent_any_further() -> None:
    """What was sent of it keeps its number, or all later confirms would be of others' messages."""
    channel = Channel()
    large = channel.tracker.post(many(OUTSTANDING + 10))
    await turn()
    waiting = channel.tracker.post([message("cancelled")])
    large.done.cancel()
    waiting.done.cancel()
    last = channel.tracker.post([message("last")])
    channel.tracker.confirmed(OUTSTANDING, multiple=True)
    await turn()
    channel.tracker.confirmed(OUTSTANDING + 1, multiple=False)
    await last.done
    assert channel.sent[OUTSTANDING:] == ["last"]


async def test_what_cannot_be_encoded_harms_no_neighbour() -> None:
    channel = Channel()
    good, bad = channel.tracker.post([message("a")]), channel.tracker.post([message("b", "x" * 300), message("c")])
    also_good = channel.tracker.post([message("d")])
    await turn()
    assert channel.sent == ["a", "d"]
    channel.tracker.confirmed(2, multiple=True)
    await asyncio.gather(good.done, also_good.done)
    with pytest.raises(ValueError, match="range"):
        await bad.done


async def test_a_blocked_channel_sends_when_it_is_unblocked() -> None:
    channel = Channel()
    channel.tracker.block()
    call = channel.tracker.post([message("a")])
    await turn()
    assert not channel.sent
    assert call.written == 0
    channel.tracker.unblock()
    await turn()
    assert channel.sent == ["a"]


async def test_a_lost_channel_ends_every_call() -> None:
    channel = Channel()
    sent, other = channel.tracker.post(many(3)), channel.tracker.post([message("other")])
    await turn()
    channel.tracker.confirmed(2, multiple=False)
    channel.tracker.stop()
    waiting = channel.tracker.post([message("late")])
    await turn()
    assert len(channel.sent) == 4
    channel.tracker.abandon()
    later = channel.tracker.post([message("later")])
    await asyncio.gather(sent.done, other.done, waiting.done, later.done)
    assert [texts(one) for one in (sent, other, waiting, later)] == [["0", "2"], ["other"], ["late"], ["later"]]
    assert (waiting.written, later.written) == (0, 0)
    await turn()
    assert len(channel.sent) == 4


async def test_a_retired_channel_rests_when_all_that_it_has_is_settled() -> None:
    channel = Channel()
    large = channel.tracker.post(many(OUTSTANDING + 1))
    await turn()
    cancelled = channel.tracker.post([message("never")])
    rest = channel.tracker.retire()
    cancelled.done.cancel()
    channel.tracker.confirmed(OUTSTANDING, multiple=True)
    await turn()
    assert not rest.done()
    channel.tracker.refused(channel.tracker._last_tag, multiple=False)
    await large.done
    assert rest.done()
    assert len(texts(large)) == 1
    assert Channel().tracker.retire().done()


async def test_a_retired_channel_that_is_lost_rests() -> None:
    channel = Channel()
    call = channel.tracker.post(many(2))
    await turn()
    rest = channel.tracker.retire()
    channel.tracker.abandon()
    assert rest.done()
    assert texts(call) == ["0", "1"]


class Clock:
    """The loop's time, put forward by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self._passed = 0.0
        real = loop.time
        monkeypatch.setattr(loop, "time", lambda: real() + self._passed)

    async def pass_by(self, seconds: float) -> None:
        self._passed += seconds
        await turn()


async def test_a_silent_channel_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that confirms something now and then, had nothing to confirm, or is blocked, is not silent."""
    channel, clock = Channel(), Clock(monkeypatch)
    call = channel.tracker.post(many(5))
    await turn()
    for tag in (1, 2, 3, 4):
        await clock.pass_by(SILENCE * 0.7)
        channel.tracker.confirmed(tag, multiple=False)
    channel.tracker.confirmed(5, multiple=False)
    await call.done
    await clock.pass_by(SILENCE * 0.9)  # the look that is due comes after the next message
    call = channel.tracker.post([message("late")])
    await turn()
    await clock.pass_by(SILENCE * 0.9)
    assert not call.done.done()
    channel.tracker.block()
    await clock.pass_by(SILENCE * 10)
    channel.tracker.unblock()
    await clock.pass_by(SILENCE * 0.9)
    assert not call.done.done()
    await clock.pass_by(SILENCE * 0.2)
    await call.done
    assert channel.tracker.is_over
    assert texts(call) == ["late"]


async def test_a_channel_that_is_still_sending_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large task on a slow line; one that only waits in the system's buffers, for a line that is dead, is."""
    channel, clock = Channel(), Clock(monkeypatch)
    call = channel.tracker.post([message("x" * 1000)])
    await turn()
    for unsent in (900, 600, 300, 0):
        channel.unsent = unsent
        await clock.pass_by(SILENCE * 0.9)
    assert not call.done.done()
    await clock.pass_by(SILENCE * 0.9)
    assert not call.done.done()
    channel.tracker.confirmed(1, multiple=False)
    await call.done
    call = channel.tracker.post([message("x" * 1000)])
    channel.unsent = 500
    await turn()
    for _ in range(2):
        await clock.pass_by(SILENCE * 0.6)
    await call.done
    assert channel.tracker.is_over


#: Calls of Python functions for a message of a large call, from its arguments to its confirm: 19 when this was written.
MOST_CALLS = 30
MESSAGES = 500


async def test_a_message_costs_few_calls() -> None:
    """The guard of the hot path: it counts, so it is the same on every machine."""
    app = App("memory://")

    @app.task
    async def say(text: str) -> None: ...

    channel = Channel()
    calls = 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    async def enqueue(count: int) -> None:
        envelopes = say._envelopes(["id"] * count, [(("hello",), {})] * count)
        call = channel.tracker.post([to_message(envelope) for envelope in envelopes])
        await turn()
        channel.tracker.confirmed(channel.tracker._last_tag, multiple=True)
        await call.done

    await enqueue(1)
    sys.setprofile(count)
    try:
        await enqueue(MESSAGES)
    finally:
        sys.setprofile(None)
    assert calls / MESSAGES < MOST_CALLS, f"{calls / MESSAGES:.1f} calls a message"
    assert module.OUTSTANDING >= MESSAGES  # or it would have waited


# Queues with a length limit


def to(queue: str, count: int) -> list[Message]:
    return [to_message(Envelope(new_id(), queue, "say", f"{queue}{n}".encode(), enqueued_at=1.0)) for n in range(count)]


async def test_few_are_on_the_way_to_a_queue_with_a_limit() -> None:
    """And nothing that goes elsewhere waits behind those that wait."""
    channel = Channel()
    channel.limits.add("small")
    small = [channel.tracker.post(to("small", BOUNDED)), channel.tracker.post(to("small", 3))]
    large = channel.tracker.post(to("large", 100))
    await turn()
    assert [text for text in channel.sent if text.startswith("small")] == [f"small{n}" for n in range(BOUNDED)]
    assert len([text for text in channel.sent if text.startswith("large")]) == 100
    channel.tracker.confirmed(2, multiple=True)
    await turn()
    assert channel.sent[-2:] == ["small0", "small1"]
    channel.tracker.confirmed(1_000, multiple=True)
    await turn()
    assert channel.sent[-1] == "small2"
    channel.tracker.confirmed(1_000, multiple=True)
    await asyncio.gather(large.done, *(call.done for call in small))


async def test_what_waits_for_a_queue_with_a_limit_ends_with_its_channel() -> None:
    channel = Channel()
    channel.limits.add("small")
    sent, waiting = channel.tracker.post(to("small", BOUNDED)), channel.tracker.post(to("small", 1))
    await turn()
    rest = channel.tracker.retire()
    channel.tracker.abandon()
    await asyncio.gather(sent.done, waiting.done, rest)
    assert (sent.written, waiting.written) == (BOUNDED, 0)


async def test_who_gives_up_makes_no_room_and_takes_none() -> None:
    channel = Channel()
    channel.limits.add("small")
    channel.tracker.post(to("small", BOUNDED))
    waiting = [channel.tracker.post(to("small", 1)) for _ in range(3)]
    await turn()
    waiting[0].done.cancel()
    channel.tracker.confirmed(1, multiple=False)
    await turn()
    channel.tracker.confirmed(2, multiple=False)
    await turn()
    assert [call.written for call in waiting] == [0, 1, 1]


async def test_a_limit_that_showed_is_forgotten() -> None:
    limits = Limits()
    limits.learn("work", 0.01)
    assert "work" in limits
    assert limits
    await asyncio.sleep(0.05)  # its time
    assert "work" not in limits
    assert not limits
