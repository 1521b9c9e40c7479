"""The delay queues of a task queue: how soon they are there, how many, and what they keep (ADR 0035)."""

from __future__ import annotations

import asyncio
import importlib
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aio_pika

from leveret import App, Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq.queues.ladder import BUSY
from leveret.brokers.rabbitmq.queues.topology import delay_declaration
from leveret.model import Envelope, Succeeded, new_id
from leveret.testing.bench import Taken
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import pytest

    from leveret.brokers import Broker, Consumer
    from leveret.model import Delivery
    from tests.conftest import Place
    from tests.support.nodes import Node

HOUR, YEAR = 3_600.0, 365 * 86_400.0


@asynccontextmanager
async def broker_on(node: Node) -> AsyncGenerator[Broker]:
    broker = connect(node.url, timeout=60.0)
    await broker.declare([Queue("work")])
    try:
        yield broker
    finally:
        await broker.close()


def delayed(seconds: float, queue: str = "work") -> Envelope:
    return Envelope(new_id(), queue, "say", b"{}", due=time.time() + seconds)


def delay_queues(node: Node) -> set[str]:
    return {row["name"] for row in node.queues("name") if row["name"].startswith("work.delay.")}


async def settled(broker: Broker, consumer: Consumer, count: int) -> list[tuple[Delivery, float]]:
    """The next deliveries, settled, and how late each came (seconds)."""
    came: list[tuple[Delivery, float]] = []
    async for arrival in consumer:
        for delivery in getattr(arrival, "deliveries", ()):
            assert delivery.envelope.due is not None
            came.append((delivery, time.time() - delivery.envelope.due))
            await broker.settle([(delivery, Succeeded())])
        if len(came) >= count:
            break
    return came


async def test_a_first_delay_does_not_wait_as_a_young_task_queue_does(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its length, and whatever was delayed before. If it did, it would wait for an hour here."""
    async with broker_on(node) as broker:
        monkeypatch.setattr(importlib.import_module("leveret.brokers.rabbitmq.queues.declare"), "_REMEMBERED", HOUR)
        for seconds in (YEAR, HOUR, 5.0, 0.3):
            await broker.publish([delayed(seconds)])


async def test_a_task_queue_has_three_delay_queues(node: Node) -> None:
    """For delays of every length, and for what comes out early."""
    async with broker_on(node) as broker, broker.consume([Queue("work")], credit=10) as consumer:
        await broker.publish([delayed(seconds) for seconds in (YEAR, HOUR, 70.0, 9.0, 4.5, 3.0, 1.3, 0.7, 0.3, 0.13)])
        came = await settled(broker, consumer, 6)
        assert all(late >= 0 for _, late in came)
        (stats,) = await broker.queues.stats(["work"])
        assert stats.delayed >= 2
        assert stats.missing == ()
    assert delay_queues(node) == {"work.delay.125", "work.delay.2000", "work.delay.512000"}


async def test_a_queue_that_delays_many_gets_closer_steps(node: Node) -> None:
    """Where many tasks would hop often, one more queue is cheaper."""
    async with broker_on(node) as broker:
        await broker.publish([delayed(4 * HOUR) for _ in range(BUSY - 1)])
        assert delay_queues(node) == {"work.delay.125", "work.delay.512000"}
        await broker.publish([delayed(4 * HOUR)])
        assert delay_queues(node) == {"work.delay.125", "work.delay.250", "work.delay.512000", "work.delay.8192000"}
        (stats,) = await broker.queues.stats(["work"])
        assert (stats.ready, stats.delayed, stats.missing) == (0, BUSY, ())
        removed = await broker.queues.purge("work")
        assert removed.delayed == BUSY


async def test_delay_queues_of_an_older_leveret_are_counted_and_return_what_they_keep(node: Node) -> None:
    """It made all that are shorter, too."""
    async with broker_on(node) as broker, await aio_pika.connect(node.url) as older:
        channel = await older.channel()
        for step in (125, 250, 500, 1_000, 2_000, 4_000):
            declaration = delay_declaration("work", step)
            await channel.declare_queue(declaration.name, durable=True, arguments=declaration.arguments)
        envelope = delayed(1.2)
        message = aio_pika.Message(
            b"{}",
            headers={"leveret-due": int((envelope.due or 0) * 1000) + 1},
            message_id=envelope.id,
            type="say",
            delivery_mode=2,
        )
        await channel.default_exchange.publish(message, "work.delay.1000")
        await channel.default_exchange.publish(message, "work.delay.4000")
        (stats,) = await broker.queues.stats(["work"])
        assert (stats.ready, stats.delayed, stats.missing) == (0, 2, ())
        async with broker.consume([Queue("work")], credit=10) as consumer:
            came = await settled(broker, consumer, 2)
    # Due after 1.2 s; the second one stays for four, as long as its queue keeps it.
    assert 0 <= came[0][1] < came[1][1]
    assert came[1][1] > 2.7


async def test_a_first_delay_survives_a_node_that_is_killed_at_once(node: Node) -> None:
    """A young queue's name is in the file of names before anything is stored in it."""
    async with broker_on(node) as broker:
        await broker.publish([delayed(HOUR)])
        node.kill()
        node.start()
        await asyncio.to_thread(node.wait)

        async def counted() -> bool:
            (stats,) = await broker.queues.stats(["work"])
            return stats.delayed == 1

        await until(counted, "the task is still there", within=60.0)


async def test_nothing_is_left_of_a_queue_that_was_deleted(node: Node) -> None:
    async with broker_on(node) as broker:
        await broker.publish([delayed(HOUR), delayed(1.0)])
        removed = await broker.queues.delete("work")
        assert removed.delayed == 2
    assert delay_queues(node) == set()


async def test_many_are_spread_over_a_time(place: Place) -> None:
    """Each comes by its own time: none early, and none with the next ones."""
    app = App(place.url)

    @app.task(queue="work")
    async def say(number: int) -> None: ...

    broker = connect(place.url, timeout=60.0)
    async with app, broker.consume([Queue("work")], credit=100) as consumer:
        handles = await say.enqueue_many([(number,) for number in range(30)], over=6)
        taken = Taken(consumer)
        for handle in handles:
            (delivery,) = await taken.next()
            assert delivery.envelope.id == handle.id
            due = delivery.envelope.due
            assert due is None or due <= time.time()
            await broker.settle([(delivery, Succeeded())])
        taken.abandon()
    await broker.close()
