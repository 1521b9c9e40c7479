"""A quorum queue whose leader gets round to nothing for a while: no acknowledgment is lost when its channel closes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from leveret.brokers import connect
from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues.requests import QUESTION
from leveret.brokers.rabbitmq.queues.topology import dead_queue
from leveret.model import DeadLettered, Envelope, Queue, Succeeded, new_id
from leveret.testing.bench import batches_of
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from leveret.brokers import Broker, Consumer
    from leveret.model import Delivery
    from tests.support.nodes import Node

#: More than a channel sends to the leader of a quorum queue before that has applied any.
COUNT = 100


def test_dead_letters_that_are_put_back_leave_their_queue(node: Node) -> None:
    async def use() -> None:
        async with tasks_on(node) as broker:
            ids = await buried(broker)
            hold(node, "work")
            putting_back = asyncio.ensure_future(broker.dead_letters.retry("work", ids))
            await until(lambda: is_asked(node, "work"), "they are on their way back")
            hold_until_asked(node, dead_queue("work"))
            release(node, "work")
            assert sorted(await putting_back) == sorted(ids)
            assert await broker.dead_letters.read("work", limit=COUNT) == []

    asyncio.run(use())


def test_dead_letters_are_put_back_by_a_publisher_that_changes_its_connection(node: Node) -> None:
    """As it does when the server confirms nothing for some seconds: what it has stored copies of leaves the dead."""

    async def use() -> None:
        async with tasks_on(node) as broker:
            ids = await buried(broker)
            hold(node, "work")
            putting_back = asyncio.ensure_future(broker.dead_letters.retry("work", ids))
            await until(lambda: is_asked(node, "work"), "they are on their way back")
            await asyncio.sleep(QUESTION)  # not asked a second time
            assert isinstance(broker, RabbitMQBroker)
            await amqp.close(await broker._publisher.connection())
            release(node, "work")
            assert sorted(await putting_back) == sorted(ids)
            assert await broker.dead_letters.read("work", limit=COUNT) == []

    asyncio.run(use())


def test_tasks_that_end_while_their_worker_stops_do_not_run_again(node: Node) -> None:
    async def use() -> None:
        async with tasks_on(node) as broker:
            async with broker.consume([Queue("work")], credit=COUNT) as consumer:
                deliveries = await taken(consumer)
                await consumer.stop()
                hold_until_asked(node, "work")
                for delivery in reversed(deliveries):  # so that each takes an acknowledgment of its own
                    await broker.settle([(delivery, Succeeded())])
            await broker.publish([Envelope(new_id(), "work", "last", b"{}")])
            async with broker.consume([Queue("work")], credit=1) as consumer:
                assert [first.envelope.task for first in await taken(consumer, 1)] == ["last"]

    asyncio.run(use())


@asynccontextmanager
async def tasks_on(node: Node) -> AsyncGenerator[Broker]:
    broker = connect(node.url, timeout=120.0)  # the server's command line, which holds queues, may take seconds
    try:
        await broker.declare([Queue("work")])
        await broker.publish([Envelope(new_id(), "work", "say", b"{}") for _ in range(COUNT)])
        yield broker
    finally:
        await broker.close()


async def buried(broker: Broker) -> list[str]:
    """The ids of the tasks, which are dead letters now."""
    async with broker.consume([Queue("work")], credit=COUNT) as consumer:
        await broker.settle([(delivery, DeadLettered("no")) for delivery in await taken(consumer)])
    return [letter.envelope.id for letter in await broker.dead_letters.read("work", limit=COUNT)]


async def taken(consumer: Consumer, count: int = COUNT) -> list[Delivery]:
    deliveries: list[Delivery] = []
    async for batch in batches_of(consumer):
        deliveries += batch
        if len(deliveries) >= count:
            break
    return deliveries


def leader(queue: str) -> str:
    """The Erlang process that is the queue on a node of its own."""
    return f"'%2F_{queue}'"


def hold(node: Node, queue: str) -> None:
    """It goes on taking commands, and applies none."""
    node.evaluate(f"sys:suspend({leader(queue)}).")


def release(node: Node, queue: str) -> None:
    node.evaluate(f"sys:resume({leader(queue)}).")


def hold_until_asked(node: Node, queue: str) -> None:
    """Until a channel has sent it what is outstanding at most, and a moment longer: for what the channel keeps back."""
    node.evaluate(
        f"Queue = whereis({leader(queue)}), sys:suspend(Queue), spawn(fun Wait() -> "
        "{_, Asked} = process_info(Queue, message_queue_len), "
        "if Asked < 16 -> timer:sleep(5), Wait(); true -> timer:sleep(300), sys:resume(Queue) end end)."
    )


async def is_asked(node: Node, queue: str) -> bool:
    asked = f"element(2, process_info(whereis({leader(queue)}), messages))"
    wanted = f"[M || M <- {asked}, lists:member(element(1, M), ['$gen_cast', '$gen_call'])] =/= []."
    return (await asyncio.to_thread(node.evaluate, wanted)).strip() == "true"
