"""Outcomes that RabbitMQ does not take: held and tried again, while the task does not run again and others do."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq.queues.topology import dead_queue
from leveret.errors import QueueFull
from leveret.model import DeadLettered, Envelope, Queue, Retrying, Succeeded, new_id
from leveret.testing.bench import Taken
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret.brokers import Broker
    from tests.support.nodes import Node

HELD = "it is held and tried again"


@contextmanager
def policy(node: Node, pattern: str, definition: str) -> Iterator[None]:
    """As an operator sets one. It is in force when this begins, and over when it ends."""
    name = f"test-{new_id()}"
    node.ctl("set_policy", name, pattern, definition, "--apply-to", "queues")
    try:
        yield
    finally:
        node.ctl("clear_policy", name)


def refuses(node: Node, queue: str) -> None:
    """Fill a queue until it refuses: what is in it is another program's."""

    async def fill() -> None:
        async with await aio_pika.connect(node.url) as connection:
            channel = await connection.channel(publisher_confirms=True)
            with suppress(aio_pika.exceptions.DeliveryError):
                while True:
                    await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)

    asyncio.run(fill())


@pytest.mark.parametrize(
    "limit",
    ['{"max-length": 2, "overflow": "reject-publish"}', '{"max-length-bytes": 1, "overflow": "reject-publish"}'],
    ids=["length", "bytes"],
)
def test_a_dead_letter_that_is_refused_is_held(node: Node, ledger: Ledger, limit: str) -> None:
    """More of them than the worker has slots; the others are run, and when there is room all are dead, once."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "first")
    with Worker(node.url, ledger, "--concurrency", "2") as worker:
        ledger.wait_for("said first")
        with policy(node, r"^work\.dead$", limit):
            refuses(node, dead_queue("work"))
            filled = client.stats("work").dead
            client.enqueue_many(ledger_app.fail_always, [(f"bad {number}",) for number in range(7)])
            ledger.wait_for("try bad", 21)
            worker.wait_for(HELD)
            client.enqueue_many(ledger_app.say, [(f"good {number}",) for number in range(20)])
            ledger.wait_for("said good", 20)
            wait_until(lambda: client.stats("work").running == 7, "all that failed are held")
        wait_until(lambda: client.stats("work").dead == filled + 7, "they are dead letters")
        client.wait_until_empty("work")
        assert ledger.count("try bad") == 21
        assert worker.output.count(HELD) == 1
        worker.wait_for("are all stored")


def test_a_stop_hands_a_held_outcome_back_and_says_so(node: Node, ledger: Ledger) -> None:
    client = Client(node.url)
    client.enqueue(ledger_app.say, "first")
    with policy(node, r"^work\.dead$", '{"max-length": 1, "overflow": "reject-publish"}'):
        with Worker(node.url, ledger, "--grace", "1") as worker:
            ledger.wait_for("said first")
            refuses(node, dead_queue("work"))
            (id_,) = client.enqueue_many(ledger_app.give_up, [("a",)])
            worker.wait_for(HELD)
            worker.signal(signal.SIGTERM)
            assert worker.exit_code() == 0
            said = worker.output
            assert "1 outcomes could not be stored until this worker stopped; their tasks go back" in said
            assert f"and run again: {id_}" in said
        assert client.stats("work").ready == 1
    with Worker(node.url, ledger):
        client.wait_until_empty("work")
    assert id_ in {letter.envelope.id for letter in client.dead("work")}


def envelope(queue: str = "work") -> Envelope:
    return Envelope(new_id(), queue, "say", b"{}", enqueued_at=time.time())


async def fill(broker: Broker) -> None:
    try:
        while True:
            await broker.publish([envelope()])
    except QueueFull:
        pass


async def test_a_retry_waits_for_room_in_its_queue(node: Node) -> None:
    """It ran; that its queue is full gives it no second run of the same attempt, and nobody waits for it."""
    queue = Queue("work", max_length=1)
    broker, producer = connect(node.url), connect(node.url)
    await producer.declare([queue])
    await producer.publish([first := envelope()])
    async with broker.consume([queue], credit=1) as consumer:
        taken = Taken(consumer)
        (delivery,) = await taken.next()
        assert delivery.envelope.id == first.id
        await fill(producer)
        async with asyncio.timeout(30):
            await broker.settle([(delivery, Retrying("once more"))])
        while delivery.envelope.id != first.id or delivery.envelope.attempt == 1:
            (delivery,) = await taken.next()
            assert delivery.envelope.id != first.id or delivery.envelope.attempt == 2
            await broker.settle([(delivery, Succeeded())])
        taken.abandon()
    await broker.close()
    await producer.close()


@pytest.mark.parametrize("credit", [1, 4])
async def test_others_come_while_outcomes_are_held(node: Node, credit: int) -> None:
    """As many as if those were settled."""
    broker, producer = connect(node.url), connect(node.url, timeout=20.0)
    queue = Queue("work")
    await producer.declare([queue])
    with ExitStack() as cleared:
        cleared.enter_context(policy(node, r"^work\.dead$", '{"max-length": 1, "overflow": "reject-publish"}'))
        async with broker.consume([queue], credit=credit) as consumer:
            await asyncio.to_thread(refuses, node, dead_queue("work"))
            taken = Taken(consumer)
            settling: list[asyncio.Task[None]] = []
            await producer.publish([envelope() for _ in range(12 + credit)])
            for _ in range(12):
                (delivery,) = await taken.next()
                settling.append(asyncio.create_task(broker.settle([(delivery, DeadLettered("no"))])))

            last = await taken.next(credit)
            assert len(last) == credit
            assert not any(task.done() for task in settling)
            cleared.close()
            await asyncio.gather(*settling)
            await broker.settle([(delivery, Succeeded()) for delivery in last])
            taken.abandon()
    await broker.close()
    await producer.close()
