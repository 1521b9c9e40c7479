"""Publishing past aiormq on real nodes, on a connection that aiormq uses too: these fail when it writes or reads
otherwise than `leveret.brokers.rabbitmq.amqp.confirm_channel` counts on.
"""

from __future__ import annotations

import asyncio
import gc
import random
import warnings
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import Hosts
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.errors import QueueFull, QueueNotFound
from leveret.model import Envelope, Queue, new_id
from tests.support.proxy import Proxy
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.nodes import Node

QUEUE = Queue("work")
#: More than two frames of RabbitMQ's default size (bytes).
LARGE = 300_000


def envelopes(count: int, queue: str = QUEUE.name) -> list[Envelope]:
    return [Envelope(new_id(), queue, "say", str(number).encode()) for number in range(count)]


async def stored(node: Node, queue: str, count: int) -> dict[str, bytes]:
    """Bodies by their id of what is in the queue, as any client reads it: so many messages and no more."""
    bodies: list[tuple[str, bytes]] = []
    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()
        consumed = await channel.get_queue(queue)

        async def take(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            bodies.append((str(message.message_id), message.body))

        await consumed.consume(take, no_ack=True)

        async def all_came() -> bool:
            return len(bodies) >= count

        await until(all_came, f"{count} messages come")
        await channel.close()
    assert len(bodies) == count
    return dict(bodies)


async def test_it_shares_its_connection_with_questions(node: Node) -> None:
    """Frames of both are whole on the wire, in both directions, and no body is mixed up."""
    broker = connect(node.url)
    await broker.declare([QUEUE])
    sent = [
        Envelope(new_id(), QUEUE.name, "say", bytes([number % 256]) * (LARGE if number % 50 == 0 else 30))
        for number in range(1_000)
    ]

    async def publish(part: Sequence[Envelope]) -> None:
        for start in range(0, len(part), 20):
            await broker.publish(part[start : start + 20])

    async def ask() -> None:
        for _ in range(10):
            await broker.declare([QUEUE])
            await broker.queues.stats([QUEUE.name])

    await asyncio.gather(ask(), *(publish(sent[start::5]) for start in range(5)))
    assert await stored(node, QUEUE.name, 1_000) == {envelope.id: envelope.body for envelope in sent}
    await broker.close()


async def test_a_cancelled_publish_is_there_or_not(node: Node) -> None:
    """Whenever it is cancelled: the others are confirmed, on the same connection, and nothing is there twice."""
    with Proxy(node.port) as proxy:
        broker = connect(proxy.url)
        await broker.declare([QUEUE])
        before = proxy.accepted
        chance = random.Random(7)
        kept: list[Envelope] = []
        cancelled: list[Envelope] = []
        for _ in range(20):
            calls = [envelopes(chance.choice([1, 1, 1, 30])) for _ in range(40)]
            publishing = [asyncio.create_task(broker.publish(call)) for call in calls]
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            for task in publishing[::2]:
                task.cancel()
            results = await asyncio.gather(*publishing, return_exceptions=True)
            for call, result in zip(calls, results, strict=True):
                assert result is None or isinstance(result, asyncio.CancelledError)
                (kept if result is None else cancelled).extend(call)
        last = envelopes(1)
        await broker.publish(last)
        assert proxy.accepted == before
        await broker.close()
    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()

        async def count() -> int:
            declared = await channel.declare_queue(QUEUE.name, passive=True)
            return declared.declaration_result.message_count or 0

        async def settled() -> int:
            first = await count()
            await asyncio.sleep(1.0)  # 3.10 counts what is in a quorum queue every few moments
            return first if first == await count() >= len(kept) + 1 else 0

        there = set(await stored(node, QUEUE.name, await until(settled, "the queue has counted")))
    assert {envelope.id for envelope in [*kept, *last]} <= there
    assert there <= {envelope.id for envelope in [*kept, *last, *cancelled]}


async def test_each_message_is_told_apart(node: Node) -> None:
    """What no queue takes, between what is stored, in one call; and an id that is there twice."""
    broker = connect(node.url)
    await broker.declare([QUEUE])
    here, nowhere = envelopes(300), envelopes(300, "nowhere")
    mixed = [one for pair in zip(here, nowhere, strict=True) for one in pair]
    twin = Envelope(here[0].id, "nowhere", "say", b"twin")
    with pytest.raises(QueueNotFound, match="no queue 'nowhere'") as caught:
        await broker.publish([*mixed, twin])
    assert sorted(caught.value.ids) == sorted(one.id for one in [*nowhere, twin])
    assert await stored(node, QUEUE.name, 300) == {one.id: one.body for one in here}
    await broker.close()


async def test_what_a_full_queue_refuses_is_named(node: Node) -> None:
    """The rest is stored. The limit is approximate by what is on the way."""
    broker = connect(node.url)
    await broker.declare([Queue("full", max_length=50)])
    sent = envelopes(3_000, "full")
    with pytest.raises(QueueFull) as caught:
        await broker.publish(sent)
    refused = set(caught.value.ids)
    there = await stored(node, "full", len(sent) - len(refused))
    assert set(there) == {envelope.id for envelope in sent} - refused
    await broker.close()


async def test_a_connection_that_always_confirms_is_alive(node: Node) -> None:
    """A server that has something to say sends no heartbeats; aiormq must not take that for silence."""
    with Proxy(node.port) as proxy:
        broker = connect(f"{proxy.url}?heartbeat=1")
        await broker.declare([QUEUE])
        before = proxy.accepted
        loop = asyncio.get_running_loop()
        began = loop.time()
        while loop.time() < began + 7.5:  # aiormq gives up after six seconds
            await broker.publish(envelopes(1))
            await asyncio.sleep(0.05)  # as a program that enqueues now and then
        assert proxy.accepted == before
        await broker.close()


async def test_an_operation_on_a_lost_link_ends_quietly(node: Node) -> None:
    """It is cancelled before its first step, and Python says nothing of it."""
    begun: list[str] = []

    async def operation() -> None:
        begun.append("lost")

    link = await amqp.Link.open(Hosts(node.url, timeout=20.0), purpose="test", confirms=False)
    await link.run(operation())
    await link.close()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(amqp.LinkLost):
            await link.run(operation())
        gc.collect()
    assert begun == ["lost"]
    assert [str(warning.message) for warning in said] == []
