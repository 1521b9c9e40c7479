"""Where news of tasks begin in the stream, and the way to it when its connection goes away; with no broker."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import TYPE_CHECKING, cast

import pytest

from leveret.brokers.feeds import Feed
from leveret.brokers.rabbitmq.amqp.hosts import Hosts
from leveret.brokers.rabbitmq.statuses.log import StatusLog
from leveret.brokers.rabbitmq.statuses.streams import place_of, was_just_made
from leveret.errors import BrokerUnavailable
from leveret.model import Envelope, Retrying, new_id
from leveret.model.status import enqueued, newer, settled, started

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.rabbitmq.queues.publisher import Publisher
    from leveret.model.status import Status

UPDATE = enqueued(Envelope("1", "work", "say", b"{}"), 1.0)


class Dropped:
    """aiormq cancels what waits on a connection that it gives up."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def connection(self) -> None:
        self.asked.set()
        raise asyncio.CancelledError


class Broken:
    """Nobody reckons with what it raises."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def connection(self) -> None:
        self.asked.set()
        await self.may_answer.wait()
        raise ZeroDivisionError


def events_by(publisher: object) -> StatusLog:
    return StatusLog(Hosts("amqp://localhost", timeout=1.0), cast("Publisher", publisher), keep=60.0, timeout=1.0)


async def asked_twice(events: StatusLog, publisher: Broken) -> list[asyncio.Task[object]]:
    """Two who ask, the second while the first is being answered."""
    first = asyncio.create_task(events.read(["a"]))
    await publisher.asked.wait()
    second = asyncio.create_task(events.read(["b"]))
    await asyncio.sleep(0)
    return [first, second]


async def answers(asking: Sequence[asyncio.Task[object]]) -> list[object]:
    async with asyncio.timeout(60):
        return list(await asyncio.gather(*asking, return_exceptions=True))


async def test_a_connection_that_is_given_up_does_not_cancel_who_records() -> None:
    events = events_by(Dropped())
    await asyncio.wait_for(events.record([UPDATE]), 60)
    await events.close()


class Taking:
    """Has whatever is published."""

    def __init__(self) -> None:
        self.published = 0

    async def connection(self) -> None:
        """There is no stream to make."""

    async def publish(self, messages: Sequence[object]) -> None:
        self.published += len(messages)


async def test_a_new_task_is_told_of_before_nobody_waits_for_that_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for it waits a moment if its id tells that it is new. One may be slow to store, or of another id."""

    async def make(*_: object) -> None: ...

    monkeypatch.setattr("leveret.brokers.rabbitmq.statuses.status_stream.make_stream", make)
    events = events_by(publisher := Taking())
    now = time.time()
    await events.notify([enqueued(Envelope(new_id(), "work", "say", b"{}"), now)])
    assert publisher.published == 0, "together with what else is told until then"
    slow = f"{int((now - 2) * 1000):012x}{new_id()[12:]}"
    for count, id_ in enumerate((slow, "an order's"), 1):
        await events.notify([enqueued(Envelope(id_, "work", "say", b"{}"), now)])
        assert publisher.published == count
    await events.notify([started(Envelope(slow, "work", "say", b"{}"), "say", now)])
    assert publisher.published == count, "only of new ones"
    await events.close()


async def test_all_who_asked_hear_that_it_is_closed() -> None:
    """Also who asked while others were answered, and who asked just before."""
    events = events_by(publisher := Broken())
    asking = await asked_twice(events, publisher)
    await events.close()
    for answer in await answers(asking):
        assert isinstance(answer, BrokerUnavailable)
    events = events_by(Broken())
    late = asyncio.create_task(events.read(["c"]))
    await asyncio.sleep(0)
    await events.close()
    (answer,) = await answers([late])
    assert isinstance(answer, BrokerUnavailable)


async def test_what_nobody_reckons_with_is_an_answer_too() -> None:
    """And the next who ask are answered for themselves."""
    events = events_by(publisher := Broken())
    asking = await asked_twice(events, publisher)
    publisher.may_answer.set()
    for answer in await answers(asking):
        assert isinstance(answer, BrokerUnavailable)
        assert isinstance(answer.__cause__, ZeroDivisionError)
    await events.close()


@pytest.mark.parametrize("id_", ["1fffffff-ffff-4fff-8fff-ffffffffffff", "ffffffff-ffff-4fff-8fff-ffffffffffff", "x"])
def test_an_id_that_tells_no_time_is_looked_for_from_the_beginning(id_: str) -> None:
    """A random UUID, as docs/wire-format.md has producers make them: read as a time, it is of the future."""
    now = time.time()
    for chosen in (id_, id_.replace("-", "")):
        assert place_of([chosen], now, 60.0) == place_of([new_id(), chosen], now, 60.0) == "first"
        assert not was_just_made(chosen, now)


def test_an_id_of_our_own_is_looked_for_from_its_time_on() -> None:
    """Although its producer's clock may be ahead."""
    now = time.time()
    for ahead in (0.0, 20.0):
        place = place_of([new_id()], now - ahead, 60.0)
        assert isinstance(place, dt.datetime)
        assert place.timestamp() == pytest.approx(now - 30.0, abs=1.0)


def test_what_was_read_up_on_brings_its_past_unless_it_is_behind() -> None:
    """Added to what was told before a lost connection, its past would be lost: an update has none."""
    envelope = Envelope("1", "work", "say", b"{}", enqueued_at=1.0)
    running, failed = started(envelope, "say", 2.0), settled(envelope, "say", Retrying("boom"), 3.0)
    feed = Feed(["1"])
    for known, past in (
        ([UPDATE, running], ["queued"]),
        ([UPDATE, running, failed], ["queued", "running"]),
        ([UPDATE, running], ["queued", "running"]),
    ):
        feed.catch_up([added_up(known)])
        assert [moment.state for moment in feed._known["1"].history] == past
    assert feed._known["1"].state == "retrying"


def added_up(updates: Sequence[Status]) -> Status:
    status = updates[0]
    for update in updates[1:]:
        status = newer(status, update)
    return status
