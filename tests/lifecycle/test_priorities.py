"""Priorities on real servers: what is on the wire, what a worker says about them, and who runs first."""

from __future__ import annotations

import logging
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from leveret import App
from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.model import DeadLettered, Envelope, Queue, Retrying, Succeeded, new_id
from leveret.testing.bench import Taken, settle_all, text
from tests.support import ledger_app
from tests.support.workers import LEDGER_APP, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from leveret.brokers import Broker
    from tests.conftest import Place
    from tests.support.client import Client
    from tests.support.nodes import Node
    from tests.support.workers import Ledger

QUORUM = {"x-queue-type": "quorum"}
#: What a quorum queue of each node makes of priorities.
SAID = {"3.10": "ignores priorities in a quorum queue; upgrade to 4.3", "4": "priorities are strict (a quorum queue"}


def envelope(body: str, **settings: Any) -> Envelope:
    return Envelope(new_id(), "work", "say", body.encode(), **settings)


@asynccontextmanager
async def broker_on(node: Node, *queues: Queue) -> AsyncGenerator[Broker]:
    broker = connect(node.url, timeout=20.0)
    await broker.declare(queues)
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def consuming(broker: Broker, queue: Queue, credit: int = 10) -> AsyncGenerator[Taken]:
    async with broker.consume([queue], credit=credit) as consumer:
        taken = Taken(consumer)
        yield taken
        taken.abandon()


async def on_the_wire(node: Node, queue: str) -> tuple[object, object]:
    """The priority of a queue's first message, which stays there: as the property, and as the header."""
    async with await aio_pika.connect(node.url) as connection:
        channel = await amqp.open_channel(connection, confirms=False)
        message = await channel.basic_get(queue)
        assert not isinstance(message.delivery, amqp.GetEmpty), f"queue {queue!r} is empty"
        properties = message.header.properties
        return properties.priority, (properties.headers or {}).get("leveret-priority")


async def declare(node: Node, **arguments: Any) -> None:
    """Queue 'work', as an operator makes it."""
    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("work", durable=True, arguments=arguments)


# On the wire


@pytest.mark.parametrize("priority", [None, 0, 7])
async def test_a_message_has_the_priority_that_was_given_and_no_other(node: Node, priority: int | None) -> None:
    """AMQP's 0 is the lowest of all on RabbitMQ 4.3: a task without a priority must not have it. Its copies neither."""
    app = App(node.url)

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    async with app:
        await say.options(priority=priority).enqueue("x")
        assert await on_the_wire(node, "work") == (priority, None)
    async with broker_on(node) as broker:
        for outcome in (Retrying("no"), DeadLettered("no")):
            async with consuming(broker, Queue("work")) as taken:
                await settle_all(broker, await taken.next(), outcome)
            if isinstance(outcome, Retrying):
                assert await on_the_wire(node, "work") == (priority, None)
        assert await on_the_wire(node, "work.dead") == (None, priority)
        (letter,) = await broker.dead_letters.read("work", limit=1)
        await broker.dead_letters.retry("work", [letter.envelope.id])
        assert await on_the_wire(node, "work") == (priority, None)


@pytest.mark.parametrize(
    ("version", "waits_as"), [(None, (7, None)), ((4, 1, 3), (None, 7))], ids=["its own", "as 4.1"]
)
async def test_a_delayed_task_waits_with_its_priority(
    node: Node, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] | None, waits_as: tuple[object, object]
) -> None:
    """As a property, but on 4.0 to 4.2, where mixed priorities would hold up one another's expiry."""
    if version:
        monkeypatch.setattr(amqp, "server_version", lambda _: version)
    async with broker_on(node, Queue("work")) as broker:
        await broker.publish([envelope("x", priority=7, due=time.time() + 5)])
        assert await on_the_wire(node, "work.delay.2000") == waits_as
        async with consuming(broker, Queue("work")) as taken:
            (delivery,) = await taken.next()
            assert delivery.envelope.priority == 7
            assert delivery.envelope.headers == {}
            await settle_all(broker, [delivery], Retrying("again"))
            (again,) = await taken.next()
        assert again.envelope.priority == 7
        assert await on_the_wire(node, "work") == (7, None)


async def test_a_foreign_priority_is_kept_whatever_it_is(node: Node) -> None:
    await declare(node, **QUORUM)
    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()
        await channel.default_exchange.publish(aio_pika.Message(b"x", priority=200), routing_key="work")
    async with broker_on(node) as broker, consuming(broker, Queue("work")) as taken:
        (delivery,) = await taken.next()
        assert delivery.envelope.priority == 200
        await settle_all(broker, [delivery], Retrying("again"))
        (again,) = await taken.next()
        assert again.envelope.priority == 200


# What is said


async def test_a_worker_says_once_what_the_server_makes_of_priorities(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "leveret.rabbitmq")
    queue = Queue("work", priorities=True)
    async with broker_on(node, queue) as broker:
        assert "priorities" not in caplog.text  # a producer has nothing to decide
        for _ in range(2):
            async with consuming(broker, queue):
                pass
    (record,) = [record for record in caplog.records if SAID[node.version] in record.getMessage()]
    assert record.levelno == (logging.INFO if node.version == "4" else logging.WARNING)


async def test_who_wants_no_priorities_hears_nothing_of_them(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leveret.rabbitmq")
    async with broker_on(node, Queue("work")) as broker, consuming(broker, Queue("work")):
        pass
    assert "priorit" not in caplog.text


async def test_a_classic_queue_is_made_on_request(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Durable, with priorities 0 to 9, and used without a complaint by whoever asked for it."""
    caplog.set_level(logging.INFO, "leveret.rabbitmq")
    queue = Queue("work", kind="classic", max_length=50)
    async with broker_on(node, queue) as broker, consuming(broker, queue), broker_on(node, queue):
        pass
    (made,) = [row for row in node.queues("name", "durable", "arguments") if row["name"] == "work"]
    assert made["durable"] is True
    arguments = made["arguments"]
    arguments = dict(arguments) if isinstance(arguments, dict) else {name: value for name, _, value in arguments}
    assert arguments == {
        "x-queue-type": "classic",
        "x-max-priority": 9,
        "x-max-length": 50,
        "x-overflow": "reject-publish",
    }
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "queue 'work': priorities are strict (a classic queue with x-max-priority=9)" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (QUORUM, "is used as it is: it is a quorum queue, and a classic one was asked for"),
        ({}, "it is a classic queue without x-max-priority, which ignores priorities"),
        ({"x-queue-type": "classic", "x-max-priority": 3}, "with x-max-priority=3, so a higher priority counts as 3"),
    ],
)
async def test_another_queue_of_that_name_is_adopted(
    node: Node, caplog: pytest.LogCaptureFixture, arguments: dict[str, Any], said: str
) -> None:
    """And what it lacks is said once."""
    caplog.set_level(logging.INFO, "leveret.rabbitmq")
    await declare(node, **arguments)
    queue = Queue("work", kind="classic")
    async with broker_on(node, queue) as broker:
        for _ in range(2):
            async with consuming(broker, queue):
                pass
    assert caplog.text.count(said) == 1
    assert (SAID[node.version] in caplog.text) == (arguments == QUORUM)


# Who runs first


def test_a_worker_runs_the_higher_priority_first(place: Place, client: Client, ledger: Ledger) -> None:
    """Quorum queues have no priorities before RabbitMQ 4.0."""
    for name, priority in (("low", 3), ("none", None), ("high", 9)):
        client.enqueue(ledger_app.say.options(priority=priority), name)
    leveret("enqueue", LEDGER_APP, "say", "top", "--priority", "9", "--id", "top-1", "--url", place.url)
    with Worker(place.url, ledger, "--concurrency", "1"):
        ledger.wait_for("said", 4)
    order = ["low", "none", "high", "top"] if "3.10" in place.kind else ["high", "top", "none", "low"]
    assert ledger.lines() == [f"said {name}" for name in order]


async def test_in_a_classic_queue_what_comes_back_stands_by_its_priority(node: Node) -> None:
    queue = Queue("work", kind="classic")
    async with broker_on(node, queue) as broker:
        await broker.publish([envelope("back")])
        async with consuming(broker, queue, credit=1) as taken:
            await taken.next()
            await broker.publish([envelope("low", priority=3), envelope("high", priority=5)])
        async with consuming(broker, queue, credit=1) as taken:
            for expected in ("high", "back", "low"):
                (delivery,) = await taken.next()
                assert text(delivery) == expected
                await settle_all(broker, [delivery], Succeeded())


async def test_a_classic_queue_delays_and_buries_like_any_other(node: Node) -> None:
    queue = Queue("work", kind="classic")
    async with broker_on(node, queue) as broker, consuming(broker, queue) as taken:
        due = time.time() + 0.6
        await broker.publish([envelope("x", priority=9, due=due)])
        (delivery,) = await taken.next()
        assert time.time() >= due
        await settle_all(broker, [delivery], DeadLettered("why"))
        (letter,) = await broker.dead_letters.read("work", limit=1)
        assert (letter.reason, letter.envelope.priority) == ("why", 9)
