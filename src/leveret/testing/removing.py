"""The checks of `conformance` for purging and deleting a queue."""

from __future__ import annotations

import time

from leveret.errors import QueueInUse, QueueNotFound
from leveret.model import DeadLettered, Succeeded
from leveret.testing.bench import Bench, Taken, becomes, check, refused, settle_all, text


async def _with_one_dead(bench: Bench) -> None:
    """The queue, with a dead letter and no consumer."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("dead"))
    async with bench.broker().consume([bench.queue], credit=1) as consumer:
        taken = Taken(consumer)
        await settle_all(broker, await taken.next(), DeadLettered("no"))
        taken.abandon()
    await becomes(broker, bench.queue, running=0, dead=1, consumers=0)


@check
async def a_purge_deletes_what_waits(bench: Bench) -> None:
    """What is ready and what is delayed, but no dead letter; the queue goes on."""
    await _with_one_dead(bench)
    broker = bench.broker()
    await broker.publish([*bench.envelopes(*"abc"), bench.envelope("later", due=time.time() + 600)])
    await becomes(broker, bench.queue, ready=3, delayed=1)
    removed = await broker.queues.purge(bench.queue.name)
    assert (removed.ready, removed.delayed, removed.dead) == (3, 1, 0)
    await becomes(broker, bench.queue, ready=0, delayed=0, dead=1)
    await broker.publish(bench.envelopes("d"))
    taken = await bench.consumer(broker, credit=1)
    deliveries = await taken.next()
    assert [text(one) for one in deliveries] == ["d"]
    await settle_all(broker, deliveries, Succeeded())


@check
async def a_deleted_queue_is_gone_and_can_be_made_again(bench: Bench) -> None:
    """With all that it had, and its pause; a program that had declared it stores into a new one."""
    await _with_one_dead(bench)
    producer, broker = await bench.declared(), bench.broker()
    await producer.publish([*bench.envelopes("a"), bench.envelope("later", due=time.time() + 600)])
    await broker.queues.pause(bench.queue.name)
    await becomes(broker, bench.queue, ready=1, delayed=1, dead=1)
    removed = await broker.queues.delete(bench.queue.name)
    assert (removed.ready, removed.delayed, removed.dead, removed.kept) == (1, 1, 1, False)
    assert [one for one in await broker.queues.stats([bench.queue.name]) if one.name == bench.queue.name] == []
    assert list(await broker.dead_letters.read(bench.queue.name, limit=10)) == []
    other = bench.other_queue()
    await broker.declare([other])  # what comes next must not go here, whatever number the store gives it
    await producer.publish(bench.envelopes("b"))
    await becomes(broker, bench.queue, ready=1, dead=0, paused=False)
    await becomes(broker, other, ready=0)


@check
async def a_queue_in_use_is_deleted_by_force_alone(bench: Bench) -> None:
    """Its consumer finishes what it has, and goes on with what comes."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"ab"))
    taken = await bench.consumer(bench.broker(), credit=1)
    (running,) = await taken.next()
    for remove in (broker.queues.purge, broker.queues.delete):
        with refused(QueueInUse):
            await remove(bench.queue.name)
    await becomes(broker, bench.queue, ready=1, running=1)
    removed = await broker.queues.purge(bench.queue.name, force=True)
    assert (removed.ready, removed.delayed) == (1, 0)
    await taken.nothing()
    await settle_all(broker, [running], Succeeded())
    await becomes(broker, bench.queue, ready=0, running=0, consumers=1)
    await broker.publish(bench.envelopes("c"))
    assert await taken.texts(1) == ["c"]


@check
async def what_is_not_there_is_not_deleted(bench: Bench) -> None:
    broker = bench.broker()
    for remove in (broker.queues.purge, broker.queues.delete):
        with refused(QueueNotFound):
            await remove(bench.queue.name)
