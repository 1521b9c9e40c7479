"""RabbitMQ queues at their limit: who gives a task to one that is full, and who has something else to do meanwhile."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq import RabbitMQBroker, amqp
from leveret.errors import QueueFull
from leveret.model import DeadLettered, Envelope, Queue, Succeeded, new_id
from leveret.status import settled
from leveret.testing.bench import Taken
from tests.support.waiting import until

if TYPE_CHECKING:
    from leveret.brokers import Broker
    from tests.support.nodes import Node

SMALL = Queue("work", max_length=1)
OTHER = Queue("other")
#: Fewer than the 2,000 that a quorum queue delivers to a consumer without a limit before any is settled.
COUNT = 1_800


def envelope(queue: Queue = SMALL) -> Envelope:
    return Envelope(new_id(), queue.name, "say", b"{}", enqueued_at=time.time())


async def fill(broker: Broker, queue: Queue) -> None:
    """Until it refuses: a quorum queue takes a few more than its limit."""
    try:
        while True:
            await broker.publish([envelope(queue)])
    except QueueFull:
        pass


async def test_a_task_that_is_not_due_yet_finds_its_queue_full(node: Node) -> None:
    """Its delay queues take longer to make than it has to wait, so it would go back to its queue: it runs when due."""
    broker, producer = connect(node.url), connect(node.url)
    await producer.declare([SMALL])
    async with await aio_pika.connect(node.url) as operator, broker.consume([SMALL], credit=1) as consumer:
        channel = await operator.channel()
        due = time.time() + 1.5
        headers: dict[str, aio_pika.abc.FieldValue] = {"leveret-due": int(due * 1000)}
        early = aio_pika.Message(b"{}", message_id="early", type="say", delivery_mode=2, headers=headers)
        await channel.default_exchange.publish(early, SMALL.name)
        await fill(producer, SMALL)
        taken = Taken(consumer)
        (delivery,) = await taken.next()
        assert delivery.envelope.id == "early"
        assert time.time() >= due
        await broker.settle([(delivery, Succeeded())])
        (delivery,) = await taken.next()
        assert delivery.envelope.id != "early"
        taken.abandon()
    await broker.close()
    await producer.close()


async def test_what_is_on_the_way_elsewhere_is_stored_once(node: Node) -> None:
    """A refusal is asked for again on a new connection; whoever publishes to another queue does not notice."""
    broker = RabbitMQBroker(node.url, timeout=20.0)
    await broker.declare([SMALL, OTHER])
    await fill(broker, SMALL)
    broker._publisher._doubted_at = float("-inf")
    before = await broker._publisher.connection()
    others = broker.publish([envelope(OTHER) for _ in range(COUNT)])
    refused, stored = await asyncio.gather(broker.publish([envelope()]), others, return_exceptions=True)
    assert isinstance(refused, QueueFull)
    assert stored is None
    assert await broker._publisher.connection() is not before
    await until(lambda: _is(amqp.is_lost(before)), "the old connection is closed")
    async with broker.consume([OTHER], credit=None) as consumer:
        taken = Taken(consumer)
        assert len({delivery.envelope.id for delivery in await taken.next(COUNT)}) == COUNT
        await taken.nothing()
        taken.abandon()
    await broker.close()


async def test_dead_letters_for_which_there_is_room_are_put_back(node: Node) -> None:
    """Those alone: what is stored is dead no more, or it would be put back, and run, again."""
    queue = Queue("work", kind="classic", max_length=3)
    broker = connect(node.url)
    await broker.declare([queue])
    ids: list[str] = []
    async with broker.consume([queue], credit=10) as consumer:
        taken = Taken(consumer)
        for _ in range(8):
            await broker.publish([envelope(queue)])
            (delivery,) = await taken.next()
            outcome = DeadLettered("no")
            await broker.settle([(delivery, outcome)], [settled(delivery.envelope, "say", outcome, time.time())])
            ids.append(delivery.envelope.id)
        taken.abandon()
    with pytest.raises(QueueFull) as caught:
        await broker.revive(queue.name, ids)
    refused = set(caught.value.ids)
    assert 0 < len(refused) < len(ids)
    assert {letter.envelope.id for letter in await broker.dead_letters(queue.name, limit=100)} == refused
    states = {status.id: status.state for status in await broker.statuses(ids)}
    assert states == {id_: "dead" if id_ in refused else "queued" for id_ in ids}
    await broker.close()


async def _is(condition: bool) -> bool:
    return condition
