"""The checks of `conformance` for pausing and resuming a queue."""

from __future__ import annotations

import asyncio

from leveret.brokers import CancelRequests, Paused
from leveret.errors import QueueNotFound
from leveret.model import Released, Retrying, Succeeded
from leveret.testing.bench import PATIENCE, Bench, becomes, check, refused, settle_all, text


@check
async def a_paused_queue_hands_nothing_out(bench: Bench) -> None:
    """All consumers stop taking from it, tasks can still be published, and resumed, all comes, in order."""
    broker = await bench.declared()
    one = await bench.consumer(bench.broker(), credit=1)
    two = await bench.consumer(bench.broker(), credit=1)
    await broker.queues.pause(bench.queue.name)
    await one.sees_paused(bench.queue)
    await two.sees_paused(bench.queue)
    await broker.publish(bench.envelopes(*"abcd"))
    await becomes(broker, bench.queue, ready=4, running=0, consumers=2, paused=True)
    await one.nothing()
    await two.nothing()
    await broker.queues.resume(bench.queue.name)
    await one.sees_paused()
    await two.sees_paused()
    deliveries = [*await one.next(), *await two.next()]
    assert sorted(map(text, deliveries)) == ["a", "b"]
    await settle_all(broker, deliveries, Succeeded())
    deliveries = [*await one.next(), *await two.next()]
    assert sorted(map(text, deliveries)) == ["c", "d"]
    await settle_all(broker, deliveries, Succeeded())
    await becomes(broker, bench.queue, ready=0, running=0, paused=False)


@check
async def a_pause_arrives(bench: Bench) -> None:
    """Who waits for deliveries learns of a pause, and of its end, each once."""
    broker = await bench.declared()
    async with bench.broker().consume([bench.queue], credit=1) as consumer, asyncio.timeout(PATIENCE):
        arriving = aiter(consumer)
        queues = broker.queues
        for change, expected in ((queues.pause, frozenset({bench.queue.name})), (queues.resume, frozenset())):
            waiting = asyncio.ensure_future(anext(arriving))
            await change(bench.queue.name)
            arrival = await waiting
            while isinstance(arrival, CancelRequests):  # perhaps of any other task
                arrival = await anext(arriving)
            assert arrival == Paused(expected)
            assert consumer.paused == expected


@check
async def what_a_paused_queue_handed_out_can_be_settled(bench: Bench) -> None:
    """What runs ends as always, and what is handed back, or tried again, waits in the queue until it is resumed."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"abcd"))
    taken = await bench.consumer(broker, credit=3)
    first, second, third = await taken.next(3)
    await broker.queues.pause(bench.queue.name)
    await taken.sees_paused(bench.queue)
    await becomes(broker, bench.queue, ready=1, running=3, paused=True)
    await broker.settle([(first, Succeeded()), (second, Retrying("again")), (third, Released())])
    await becomes(broker, bench.queue, ready=3, running=0, paused=True)
    await taken.nothing()
    await broker.queues.resume(bench.queue.name)
    again = await taken.next(3)
    assert sorted((text(delivery), delivery.envelope.attempt) for delivery in again) == [("b", 2), ("c", 1), ("d", 1)]
    await settle_all(broker, again, Succeeded())
    await becomes(broker, bench.queue, ready=0, running=0, paused=False)


@check
async def a_consumer_that_comes_later_sees_the_pause(bench: Bench) -> None:
    """And so does another broker's; its other queues are not paused."""
    other = bench.other_queue()
    broker = await bench.declared()
    await broker.declare([other])
    await broker.queues.pause(bench.queue.name)
    await broker.publish([*bench.envelopes("paused"), bench.envelope("free", queue=other.name)])
    taken = await bench.consumer(bench.broker(), bench.queue, other, credit=5)
    assert await taken.texts(1) == ["free"]
    await taken.nothing()
    await taken.sees_paused(bench.queue)
    await becomes(broker, other, paused=False)
    await broker.queues.resume(bench.queue.name)
    assert await taken.texts(1) == ["paused"]


@check
async def a_queue_may_be_paused_again_and_again(bench: Bench) -> None:
    """Pausing what is paused changes nothing, and what runs through it all is settled at the end."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a", "b"))
    taken = await bench.consumer(broker, credit=1)
    (running,) = await taken.next()
    for _ in range(3):
        await broker.queues.pause(bench.queue.name)
        await broker.queues.pause(bench.queue.name)
        await taken.sees_paused(bench.queue)
        await broker.queues.resume(bench.queue.name)
        await broker.queues.resume(bench.queue.name)
        await taken.sees_paused()
    await broker.settle([(running, Succeeded())])
    assert await taken.texts(1) == ["b"]
    await becomes(broker, bench.queue, ready=0, running=1, paused=False)


@check
async def credit_holds_across_a_pause(bench: Bench) -> None:
    """A consumer that is resumed while it has unsettled deliveries gets no more than its credit allows."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"abcdefgh"))
    taken = await bench.consumer(broker, credit=3)
    held = await taken.next(3)
    await broker.settle([(held.pop(0), Succeeded())])
    held += await taken.next(1)
    await broker.queues.pause(bench.queue.name)
    await taken.sees_paused(bench.queue)
    await broker.settle([(held.pop(0), Succeeded())])
    await broker.queues.resume(bench.queue.name)
    await taken.sees_paused()
    held += await taken.next(1)
    await taken.nothing()
    for _ in range(3):
        await broker.settle([(held.pop(0), Succeeded())])
        held += await taken.next(1)
        await taken.nothing()


@check
async def a_queue_that_is_not_there_cannot_be_paused(bench: Bench) -> None:
    """A misspelt name is an error."""
    for change in (bench.broker().queues.pause, bench.broker().queues.resume):
        with refused(QueueNotFound) as refusal:
            await change(bench.queue.name)
        assert bench.queue.name in str(refusal[0])
