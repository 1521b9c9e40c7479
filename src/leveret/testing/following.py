"""The checks of `conformance` for what became of a task: statuses, news of them, and cancellation."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers import CancelRequests, Deliveries
from leveret.errors import BrokerUnavailable
from leveret.model import (
    Cancelled,
    CancelRequest,
    DeadLettered,
    Envelope,
    Progress,
    Released,
    Retrying,
    Succeeded,
    enqueued,
    settled,
    started,
)
from leveret.testing.bench import PATIENCE, QUIET, Bench, batches_of, becomes, cancel_requests, check

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.brokers import Arrival, Broker, Consumer, Feed
    from leveret.model import Delivery, Outcome, Status


class News:
    """A feed, read one status at a time."""

    def __init__(self, feed: Feed) -> None:
        self._feed: AsyncIterator[Sequence[Status]] = aiter(feed)

    async def until(self, *states: str) -> Status:
        """The first status in one of the states."""
        async with asyncio.timeout(PATIENCE):
            async for batch in self._feed:
                for status in batch:
                    if status.state in states:
                        return status
        raise AssertionError("the feed ended")


async def published(broker: Broker, envelope: Envelope) -> None:
    """As an application does it."""
    await broker.publish([envelope])
    await broker.statuses.notify([enqueued(envelope, time.time())])


async def ended(broker: Broker, delivery: Delivery, outcome: Outcome) -> None:
    """As a worker does it."""
    envelope = delivery.envelope
    await broker.settle([(delivery, outcome)], [settled(envelope, envelope.task, outcome, time.time())])


async def status_of(broker: Broker, id_: str, *states: str) -> Status:
    """The status, once it is in one of the states: producers' word may come a moment later."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        found = await broker.statuses.read([id_])
        if found and found[0].state in states:
            return found[0]
        assert asyncio.get_running_loop().time() < deadline, f"{states} was due, it is {found}"
        await asyncio.sleep(0.05)


def sent(bench: Bench, text: str, **changes: object) -> Envelope:
    return bench.envelope(text, enqueued_at=time.time(), **changes)


def follow(broker: Broker, *envelopes: Envelope) -> AbstractAsyncContextManager[Feed]:
    return broker.statuses.follow([envelope.id for envelope in envelopes])


@check
async def a_status_is_known_everywhere(bench: Bench) -> None:
    """Another program can ask: queued, running, succeeded with the result; and nothing of what never was."""
    broker, other = await bench.declared(), bench.broker()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    assert (await status_of(other, envelope.id, "queued")).task == "check"
    taken = await bench.consumer(broker)
    (delivery,) = await taken.next()
    await broker.statuses.notify([started(envelope, "check", time.time())])
    status = await status_of(other, envelope.id, "running")
    assert status.started_at is not None
    assert status.worker is not None
    await ended(broker, delivery, Succeeded(b'{"a":[1,2]}'))
    status = await status_of(other, envelope.id, "succeeded")
    assert bytes(status.encoded_result) == b'{"a":[1,2]}'
    assert (status.queue, status.attempt) == (bench.queue.name, 1)
    assert await other.statuses.read(["0" * 32, "never-was"]) == []


@check
async def a_task_that_a_worker_holds_is_queued_until_it_begins(bench: Bench) -> None:
    """Its worker may have taken it long before it has a slot for it."""
    broker, other = await bench.declared(), bench.broker()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    taken = await bench.consumer(broker)
    (delivery,) = await taken.next()
    await becomes(broker, bench.queue, running=1)
    assert (await status_of(other, envelope.id, "queued", "running")).state == "queued"
    await broker.statuses.notify([started(envelope, "check", time.time())])
    await status_of(other, envelope.id, "running")
    await ended(broker, delivery, Succeeded(b"1"))


@check
async def who_follows_is_told_each_change(bench: Bench) -> None:
    """What is known at first, progress, a retry with its time and error, the end: none of it asked for again."""
    broker, other = await bench.declared(), bench.broker()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    await status_of(other, envelope.id, "queued")
    async with follow(other, envelope) as feed:
        news = News(feed)
        assert (await news.until("queued")).attempt == 1
        taken = await bench.consumer(broker)
        (delivery,) = await taken.next()
        running = started(envelope, "check", time.time())
        await broker.statuses.notify([running])
        assert (await news.until("running")).progress is None
        await broker.statuses.notify([msgspec.structs.replace(running, progress=Progress(3, 7, "half"))])
        assert (await news.until("running")).progress == Progress(3, 7, "half")
        await ended(broker, delivery, Retrying("it broke", "the traceback", delay=0.3))
        status = await news.until("retrying")
        assert (status.attempt, status.error, status.traceback) == (2, "it broke", "the traceback")
        assert status.due is not None
        assert status.due > time.time() - PATIENCE
        (delivery,) = await taken.next()
        await ended(broker, delivery, DeadLettered("for good", "deep"))
        status = await news.until("dead")
        assert (status.error, status.traceback, status.attempt) == ("for good", "deep", 2)


@check
async def who_follows_hears_that_the_broker_is_closed(bench: Bench) -> None:
    """Instead of waiting for ever. What was told until then is not lost."""
    broker, other = await bench.declared(), bench.broker()
    envelope = sent(bench, "a")
    async with follow(broker, envelope) as feed, broker.statuses.watch() as watch:
        news = News(feed)
        await published(broker, envelope)
        await news.until("queued")
        await (await bench.consumer(other)).next()
        await broker.statuses.notify([started(envelope, envelope.task, time.time())])
        await broker.close()
        for ended_ in (feed, watch):
            try:
                async with asyncio.timeout(PATIENCE):
                    async for _ in ended_:
                        pass
            except BrokerUnavailable:
                continue
            raise AssertionError("it goes on")
    assert (await status_of(other, envelope.id, "running")).attempt == 1


@check
async def a_late_reader_misses_nothing(bench: Bench) -> None:
    """What ended before anybody asked is told at once; many tasks are followed together; others' news do not come."""
    broker, other = await bench.declared(), bench.broker()
    envelopes = [sent(bench, str(number)) for number in range(40)]
    stranger = sent(bench, "stranger")
    await broker.publish([*envelopes, stranger])
    taken = await bench.consumer(broker, credit=100)
    deliveries = await taken.next(41)
    for delivery in deliveries[:20]:
        await ended(broker, delivery, Succeeded(delivery.envelope.body))
    async with follow(other, *envelopes) as feed:
        results: dict[str, bytes] = {}
        for delivery in deliveries[20:]:
            await ended(broker, delivery, Succeeded(b'"%b"' % delivery.envelope.body))
        async with asyncio.timeout(PATIENCE):
            async for batch in feed:
                results |= {status.id: bytes(status.encoded_result) for status in batch if status.is_final}
                if len(results) == 40:
                    break
    assert stranger.id not in results
    assert [results[envelope.id].strip(b'"').decode() for envelope in envelopes] == [str(n) for n in range(40)]


@check
async def a_large_result_arrives(bench: Bench) -> None:
    """A mebibyte, several at once."""
    broker, other = await bench.declared(), bench.broker()
    envelopes = [sent(bench, str(number)) for number in range(3)]
    await broker.publish(envelopes)
    taken = await bench.consumer(broker)
    deliveries = await taken.next(3)
    body = b'"%b"' % (b"x" * (1024 * 1024 - 2))
    now = time.time()
    await broker.settle(
        [(delivery, Succeeded(body)) for delivery in deliveries],
        [settled(delivery.envelope, "check", Succeeded(body), now) for delivery in deliveries],
    )
    for envelope in envelopes:
        status = await status_of(other, envelope.id, "succeeded")
        assert bytes(status.encoded_result) == body


@check
async def a_delayed_task_says_when(bench: Bench) -> None:
    """Its status has the time; handed back by a worker that stops, a task is queued again."""
    broker = await bench.declared()
    due = time.time() + 3_600
    delayed, returned = sent(bench, "later", due=due), sent(bench, "returned")
    await published(broker, delayed)
    assert (await status_of(broker, delayed.id, "delayed")).due == due
    await published(broker, returned)
    taken = await bench.consumer(broker)
    (delivery,) = await taken.next()
    await broker.statuses.notify([started(returned, "check", time.time())])
    await status_of(broker, returned.id, "running")
    await taken.consumer.stop()
    await ended(broker, delivery, Released())
    assert (await status_of(broker, returned.id, "queued")).attempt == 1


@check
async def a_revived_task_is_queued_again(bench: Bench) -> None:
    """Dead, put back, and then what becomes of its new life."""
    broker = await bench.declared()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    async with broker.consume([bench.queue], credit=1) as consumer:
        async for (delivery,) in batches_of(consumer):
            await ended(broker, delivery, DeadLettered("broken"))
            break
    await status_of(broker, envelope.id, "dead")
    await becomes(broker, bench.queue, dead=1)
    await broker.dead_letters.retry(bench.queue.name, [envelope.id])
    await status_of(broker, envelope.id, "queued")
    taken = await bench.consumer(broker)
    (delivery,) = await taken.next()
    await ended(broker, delivery, Succeeded(b"1"))
    await status_of(broker, envelope.id, "succeeded")


@check
async def a_cancelled_task_that_waits_never_runs(bench: Bench) -> None:
    """Ready or delayed: it is cancelled, whoever follows is told, and its neighbours run. What is marked is settled."""
    broker, other = await bench.declared(), bench.broker()
    ready, delayed, neighbour = sent(bench, "ready"), sent(bench, "delayed", due=time.time() + 0.6), sent(bench, "next")
    for envelope in (ready, delayed, neighbour):
        await published(broker, envelope)
    for envelope in (ready, delayed):
        await status_of(other, envelope.id, "queued", "delayed")
        async with follow(other, envelope) as feed:
            status = await other.control.cancel(envelope.id)
            assert status is not None
            assert status.state == "cancelled"
            assert "before it ran" in ((await News(feed).until("cancelled")).error or "")
    async with asyncio.timeout(PATIENCE), broker.consume([bench.queue], credit=5) as consumer:
        marked: set[str] = set()
        ran: list[str] = []
        deadline = time.time() + 2.0
        async for arrival in _ticking(consumer, deadline):
            if isinstance(arrival, CancelRequests):
                marked |= {mark.id for mark in arrival.requests}
            for delivery in arrival.deliveries if isinstance(arrival, Deliveries) else ():
                if delivery.envelope.id in marked:
                    await ended(broker, delivery, Cancelled("cancelled before it ran"))
                else:
                    ran.append(delivery.envelope.body.decode())
                    await ended(broker, delivery, Succeeded(b"null"))
    assert ran == ["next"]
    for envelope in (ready, delayed):
        assert (await status_of(other, envelope.id, "cancelled")).error == "cancelled before it ran"


@check
async def who_runs_a_cancelled_task_is_told(bench: Bench) -> None:
    """The request arrives at its consumer; the worker's word is the last."""
    broker, other = await bench.declared(), bench.broker()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    async with broker.consume([bench.queue], credit=1) as consumer, asyncio.timeout(PATIENCE):
        (delivery,) = await anext(batches_of(consumer))
        await broker.statuses.notify([started(envelope, "check", time.time())])
        await status_of(other, envelope.id, "running")
        cancelling = asyncio.ensure_future(other.control.cancel(envelope.id))
        request = await _request(consumer, envelope)
        assert request.covers(envelope)
        assert not request.covers(msgspec.structs.replace(envelope, enqueued_at=request.at + 1))
        status = await cancelling
        assert status is not None
        assert status.state == "running"
        await ended(broker, delivery, Cancelled("cancelled while it ran"))
        assert (await status_of(other, envelope.id, "cancelled")).error == "cancelled while it ran"
    await becomes(broker, bench.queue, ready=0, running=0, dead=0)


@check
async def who_runs_a_cancelled_task_that_is_acknowledged_is_told(bench: Bench) -> None:
    """The broker has it no more (``acknowledge="before"``), and knows not who has: all who may have it are told."""
    broker, other = await bench.declared(), bench.broker()
    acknowledged, neighbour, unrecorded = (sent(bench, text) for text in ("acknowledged", "neighbour", "unrecorded"))
    await published(broker, acknowledged)
    await published(broker, neighbour)
    await broker.publish([unrecorded])
    async with broker.consume([bench.queue], credit=3) as consumer, asyncio.timeout(PATIENCE):
        coming = batches_of(consumer)
        deliveries: dict[str, Delivery] = {}
        while len(deliveries) < 3:
            deliveries |= {delivery.envelope.id: delivery for delivery in await anext(coming)}
        for envelope in (acknowledged, unrecorded):
            await broker.settle([(deliveries[envelope.id], Succeeded())])
        await broker.statuses.notify([started(acknowledged, "check", time.time())])
        await status_of(other, acknowledged.id, "running")
        status = await other.control.cancel(acknowledged.id)
        assert status is not None
        assert status.state == "running"
        await other.control.cancel(unrecorded.id)
        # An outcome of another task, before the marks are read, does not hide them.
        await ended(broker, deliveries[neighbour.id], Succeeded(b"1"))
        marks: dict[str, CancelRequest] = {}
        requests = cancel_requests(consumer)
        while not marks.keys() >= {acknowledged.id, unrecorded.id}:
            request = await anext(requests)
            marks[request.id] = request
        assert marks[acknowledged.id].covers(acknowledged)
        assert neighbour.id not in marks
        await broker.settle((), [settled(acknowledged, "check", Cancelled("cancelled while it ran"), time.time())])
        assert (await status_of(other, acknowledged.id, "cancelled")).error == "cancelled while it ran"


@check
async def who_takes_no_more_still_hears_of_a_cancellation(bench: Bench) -> None:
    """What it runs may take long: its iteration goes on until it is left."""
    broker, other = await bench.declared(), bench.broker()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    async with asyncio.timeout(PATIENCE):
        async with broker.consume([bench.queue], credit=1) as consumer:
            (delivery,) = await anext(batches_of(consumer))
            await broker.statuses.notify([started(envelope, "check", time.time())])
            await status_of(other, envelope.id, "running")
            await consumer.stop()
            await other.control.cancel(envelope.id)
            assert (await _request(consumer, envelope)).covers(envelope)
            await ended(broker, delivery, Cancelled("cancelled while it ran"))
        assert [arrival async for arrival in consumer] == []


@check
async def what_is_cancelled_and_comes_back_does_not_run(bench: Bench) -> None:
    """Its worker heard nothing of it, and the attempt failed or was handed back: its next worker must not run it."""
    broker, other = await bench.declared(), bench.broker()
    for outcome in (Retrying("it broke"), Retrying("it broke", delay=0.3), Released()):
        envelope, neighbour = sent(bench, "a"), sent(bench, "next")
        await published(broker, envelope)
        async with broker.consume([bench.queue], credit=1) as consumer:
            (delivery,) = await anext(batches_of(consumer))
            await consumer.stop()
            await broker.statuses.notify([started(envelope, "check", time.time())])
            await status_of(other, envelope.id, "running")
            await other.control.cancel(envelope.id)
            await ended(broker, delivery, outcome)
        await published(broker, neighbour)
        assert await _ran(broker, bench, 1.5) == ["next"]
        await status_of(other, envelope.id, "cancelled")
    await becomes(broker, bench.queue, ready=0, running=0, dead=0)


@check
async def what_was_cancelled_in_vain_may_live_again(bench: Bench) -> None:
    """Whether it was dead already, or died at that moment: put back, it runs; cancelled then, it does not."""
    broker, other = await bench.declared(), bench.broker()
    late, early, again = (sent(bench, text) for text in ("late", "early", "again"))
    ids = [late.id, early.id, again.id]
    for envelope in (late, early, again):
        await published(broker, envelope)
    async with broker.consume([bench.queue], credit=3) as consumer:
        deliveries: list[Delivery] = []
        async for batch in batches_of(consumer):
            deliveries += batch
            if len(deliveries) == 3:
                break
        for delivery in deliveries:
            if delivery.envelope.id == early.id:
                await broker.statuses.notify([started(early, "check", time.time())])
                await status_of(other, early.id, "running")
                await other.control.cancel(early.id)
            await ended(broker, delivery, DeadLettered("broken"))
    await becomes(broker, bench.queue, dead=3)
    status = await other.control.cancel(late.id)
    assert status is not None
    assert status.state == "dead"
    known = [CancelRequest(id_, time.time()) for id_ in ids]
    assert sorted(await other.dead_letters.retry(bench.queue.name, ids)) == sorted(ids)
    await other.control.cancel(again.id)
    assert sorted(await _ran(broker, bench, 1.5, known)) == ["early", "late"]


@check
async def it_is_too_late_to_cancel_what_has_ended(bench: Bench) -> None:
    """The status tells how it ended; nothing is known of what never was."""
    broker = await bench.declared()
    envelope = sent(bench, "a")
    await published(broker, envelope)
    taken = await bench.consumer(broker)
    (delivery,) = await taken.next()
    await ended(broker, delivery, Succeeded(b"1"))
    status = await broker.control.cancel(envelope.id)
    assert status is not None
    assert status.state == "succeeded"
    assert await broker.control.cancel("never-was") is None


async def _ran(broker: Broker, bench: Bench, seconds: float, known: Sequence[CancelRequest] = ()) -> list[str]:
    """What a worker that heeds all marks, and knows some already, runs within that time."""
    ran: list[str] = []
    marks = list(known)
    async with asyncio.timeout(PATIENCE), broker.consume([bench.queue], credit=5) as consumer:
        async for arrival in _ticking(consumer, time.time() + seconds):
            if isinstance(arrival, CancelRequests):
                marks += arrival.requests
            for delivery in arrival.deliveries if isinstance(arrival, Deliveries) else ():
                if any(mark.id == delivery.envelope.id and mark.covers(delivery.envelope) for mark in marks):
                    await ended(broker, delivery, Cancelled("cancelled before it ran"))
                else:
                    ran.append(delivery.envelope.body.decode())
                    await ended(broker, delivery, Succeeded(b"null"))
    return ran


async def _request(consumer: Consumer, envelope: Envelope) -> CancelRequest:
    """That it is cancelled."""
    async for request in cancel_requests(consumer):
        if request.id == envelope.id:
            return request
    raise AssertionError("the iteration has ended")


async def _ticking(consumer: Consumer, deadline: float) -> AsyncIterator[Arrival]:
    """What arrives at a consumer until that time."""
    arriving = aiter(consumer)
    while (left := deadline - time.time()) > 0:
        waiting = asyncio.ensure_future(anext(arriving))
        done, _ = await asyncio.wait([waiting], timeout=max(left, QUIET))
        if not done:
            waiting.cancel()
            return
        yield waiting.result()
