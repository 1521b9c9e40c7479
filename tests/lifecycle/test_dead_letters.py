"""Looking at dead letters on RabbitMQ brings none of them nearer to its end, whatever policy their queue has."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.brokers.rabbitmq.queues.topology import dead_queue
from leveret.model import DeadLettered, Envelope, Queue, new_id, settled
from leveret.testing.bench import Taken
from tests.support.workers import leveret

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from leveret.brokers import Broker
    from tests.support.nodes import Node

#: More than the limit that RabbitMQ 4 has by itself.
LOOKS = 23


@contextmanager
def delivery_limit(node: Node, limit: int) -> Iterator[None]:
    name = f"test-{new_id()}"
    node.ctl("set_policy", name, "^work", f'{{"delivery-limit": {limit}}}', "--apply-to", "queues")
    try:
        yield
    finally:
        node.ctl("clear_policy", name)


async def bury(broker: Broker, count: int) -> list[str]:
    """So many dead letters, the oldest first."""
    ids: list[str] = []
    async with broker.consume([Queue("work")], credit=1) as consumer:
        taken = Taken(consumer)
        for number in range(count):
            envelope = Envelope(new_id(), "work", "say", f'{{"args": [{number}]}}'.encode(), enqueued_at=time.time())
            await broker.publish([envelope])
            (delivery,) = await taken.next()
            await broker.settle([(delivery, DeadLettered("no"))])
            ids.append(envelope.id)
        taken.abandon()
    return ids


async def seen(broker: Broker, limit: int = 100) -> Sequence[str]:
    return [letter.envelope.id for letter in await broker.dead_letters.read("work", limit=limit)]


@pytest.mark.parametrize("limit", [1, 2, 20])
async def test_looking_loses_nothing(node: Node, limit: int) -> None:
    """They stay, in their order, each once: at looks at all, at the first ones, and where others are decided about."""
    broker = connect(node.url, timeout=20.0)
    with delivery_limit(node, limit):
        ids = await bury(broker, 5)
        for _ in range(LOOKS):
            assert await seen(broker) == ids
            assert await seen(broker, 2) == ids[:2]
        dropped = ids.pop(2)
        for number in range(LOOKS):
            assert await broker.dead_letters.drop("work", [dropped]) == ([dropped] if number == 0 else [])
        assert await broker.dead_letters.retry("work", ["unknown"]) == []
        assert await seen(broker) == ids
        listed = await asyncio.to_thread(leveret, "dead", "list", "work", "--url", node.url)
        assert all(id_[:8] in listed for id_ in ids)
        shown = await asyncio.to_thread(leveret, "dead", "show", "work", ids[0], "--url", node.url)
        assert "no" in shown
        revived = ids.pop(0)
        assert await broker.dead_letters.retry("work", [revived]) == [revived]
        assert await seen(broker) == ids
    await broker.close()


@pytest.mark.parametrize("put_back", [True, False])
async def test_a_dead_letter_that_is_announced_is_waited_for(node: Node, put_back: bool) -> None:
    """A worker tells that a task is dead, and stores the dead letter a moment later."""
    broker = RabbitMQBroker(node.url, timeout=20.0)
    queue = Queue("work")
    await broker.declare([queue])
    envelope = Envelope(new_id(), "work", "say", b"{}", enqueued_at=time.time())
    await broker.publish([envelope])
    async with broker.consume([queue], credit=1) as consumer:
        (delivery,) = await Taken(consumer).next()
        await broker.statuses.record([settled(envelope, None, DeadLettered("no"), time.time())])
        decide = broker.dead_letters.retry if put_back else broker.dead_letters.drop
        deciding = asyncio.ensure_future(decide("work", [envelope.id]))
        looked = asyncio.ensure_future(broker.dead_letters.drop("work", ["unknown"]))
        assert await looked == []
        await broker.settle([(delivery, DeadLettered("no"))])
        assert await deciding == [envelope.id]
    await broker.close()


async def test_a_look_that_is_killed_is_made_up_for(node: Node) -> None:
    """Its connection ends while it holds them, which RabbitMQ counts; the next look has the count begin anew."""
    broker = RabbitMQBroker(node.url, timeout=20.0)
    with delivery_limit(node, 1):
        ids = await bury(broker, 3)
        for _ in range(4):
            async with await aio_pika.connect(node.url) as connection:
                channel = await connection.channel()
                for _ in ids:
                    await (await channel.get_queue(dead_queue("work"), ensure=False)).get()
            assert await seen(broker) == ids
    await broker.close()


async def test_many_are_looked_at(node: Node) -> None:
    """More than are stored anew together."""
    broker = connect(node.url, timeout=20.0)
    with delivery_limit(node, 1):
        ids = set(await bury(broker, 1_100))
        for _ in range(3):
            assert set(await seen(broker, 2_000)) == ids
            assert len(await seen(broker, 20)) == 20
    await broker.close()
