"""Publisher confirms on RabbitMQ: `enqueue` returns when the task is safe, and raises in time when it is not."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret import (
    App,
    BrokerBlocked,
    BrokerRefused,
    BrokerUnavailable,
    EnqueueTimeout,
    Queue,
    QueueMismatch,
    QueueNotFound,
    TaskTooLarge,
)
from leveret.brokers import connect
from leveret.brokers.rabbitmq import RabbitMQBroker, holding
from leveret.model import DeadLettered, Envelope, new_id
from leveret.testing.bench import Taken
from tests.support.nodes import free_ports
from tests.support.proxy import Proxy
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from leveret.brokers import Broker
    from tests.support.nodes import Node


def app_on(url: str, timeout: float = 20.0, queue: str = "work", max_message_size: int = 2**20) -> App:
    app = App(url, enqueue_timeout=timeout, queues=[Queue(queue)], max_message_size=max_message_size)

    @app.task(queue=queue)
    async def say(text: str) -> None: ...

    return app


async def ready_in(node: Node, queue: str = "work") -> int:
    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()
        declared = await channel.declare_queue(queue, passive=True)
        return declared.declaration_result.message_count or 0


async def holds(node: Node, count: int, queue: str = "work") -> None:
    """A quorum queue counts what it has a moment later, if it is busy or was just restarted."""

    async def counted() -> bool:
        return await ready_in(node, queue) == count

    await until(counted, f"queue {queue!r} holds {count}")


async def test_it_survives_the_node(node: Node) -> None:
    """Confirmed, durable and persistent: kill -9 at once after the confirm loses nothing."""
    async with app_on(node.url) as app:
        (say,) = app.tasks
        await say.enqueue_many([(str(number),) for number in range(100)])
        node.restart()
        await holds(node, 100)


async def test_a_node_that_is_down_is_an_error_in_time(node: Node) -> None:
    app = app_on("amqp://guest:guest@127.0.0.1:{}/".format(*free_ports(1)), timeout=1.0)
    (say,) = app.tasks
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(BrokerUnavailable, match="within 1 s") as caught:
            await say.enqueue("x")
    assert "guest:guest" not in str(caught.value)
    await app.close()
    async with app_on(node.url, timeout=1.0) as app:
        (say,) = app.tasks
        await say.enqueue("before")
        node.kill()
        try:
            with pytest.raises((BrokerUnavailable, EnqueueTimeout)):
                await say.enqueue("x")
        finally:
            node.start()
            node.wait()
        await until(lambda: enqueued(app), "the node takes tasks again")


async def enqueued(app: App) -> bool:
    (say,) = app.tasks
    try:
        await say.enqueue("after")
    except BrokerUnavailable:
        return False
    return True


async def test_a_restart_within_the_timeout_is_waited_for(node: Node) -> None:
    async with app_on(node.url, timeout=60.0) as app:
        (say,) = app.tasks
        await say.enqueue("before")
        node.kill()
        waiting = asyncio.create_task(say.enqueue("during"))
        node.start()
        await asyncio.to_thread(node.wait)
        await waiting
        await holds(node, 2)


async def test_an_alarm_blocks_and_is_told(node: Node) -> None:
    """A memory alarm: an error in time; when it ends, publishing goes on."""
    async with app_on(node.url, timeout=2.0) as app:
        (say,) = app.tasks
        await say.enqueue("before")
        node.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            # The first one is on the way when the server blocks; the second waits for the end of the blocking.
            for _ in range(2):
                async with asyncio.timeout(PATIENCE):
                    with pytest.raises(BrokerBlocked, match="alarm"):
                        await say.enqueue("during")
        finally:
            node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
        await until(lambda: enqueued(app), "the alarm is over")


async def test_a_silent_connection_is_an_error_in_time(node: Node) -> None:
    """A peer that answers nothing any more: no hang past the timeout."""
    with Proxy(node.port) as proxy:
        async with app_on(proxy.url, timeout=1.0) as app:
            (say,) = app.tasks
            await say.enqueue("before")
            proxy.swallow()
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(EnqueueTimeout, match="did not confirm 1 tasks within 1 s"):
                    await say.enqueue("x")
            proxy.resume()
            proxy.cut()
            await until(lambda: enqueued(app), "the connection is mended")


async def test_what_is_too_large_is_refused(node: Node) -> None:
    """By Leveret's own limit before anything is sent; by the server's without harm to the neighbours."""
    async with app_on(node.url, max_message_size=1000) as app:
        (say,) = app.tasks
        with pytest.raises(TaskTooLarge, match="over the limit of 1000"):
            await say.enqueue("x" * 1000)
    with limited(node, 500_000):
        async with app_on(node.url, max_message_size=2**30) as app:
            (say,) = app.tasks
            big = asyncio.create_task(say.enqueue("x" * 500_000))
            small = [asyncio.create_task(say.enqueue(str(number))) for number in range(20)]
            await asyncio.gather(*small)
            with pytest.raises(TaskTooLarge, match="this RabbitMQ's limit"):
                await big
            await say.enqueue("after")


async def test_an_outcome_that_is_too_large_by_now_is_held(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's limit was lowered: nothing is lost, and the publishing channel is not closed again and again."""
    monkeypatch.setattr(holding, "RARELY", 5.0)
    broker, producer = connect(node.url, timeout=20.0), connect(node.url, timeout=20.0)
    await producer.declare([Queue("work")])
    await producer.publish([Envelope(new_id(), "work", "say", bytes(600_000))])
    with limited(node, 500_000):
        async with broker.consume([Queue("work")], credit=1) as consumer:
            taken = Taken(consumer)
            (delivery,) = await taken.next()
            settling = asyncio.create_task(broker.settle([(delivery, DeadLettered("no"))]))
            await until(lambda: caplog.text.count("cannot be stored") > 0, "it is refused")
            limit_messages(node, default_limit(node))
            await settling
            taken.abandon()
        assert caplog.text.count("cannot be stored") < 3
        (letter,) = await broker.dead_letters.read("work", limit=1)
        assert letter.envelope.body == bytes(600_000)
        await broker.close()
        await producer.close()


def default_limit(node: Node) -> int:
    return 16 * 2**20 if node.version == "4" else 128 * 2**20


@contextmanager
def limited(node: Node, size: int) -> Iterator[None]:
    limit_messages(node, size)
    try:
        yield
    finally:
        limit_messages(node, default_limit(node))


def limit_messages(node: Node, size: int) -> None:
    """Of channels that are opened from now on; RabbitMQ 3.10 looks in the one place, 4 in the other."""
    node.evaluate(
        f"application:set_env(rabbit, max_message_size, {size}), persistent_term:put(max_message_size, {size})."
    )


async def test_a_deleted_queue_is_made_again_or_an_error(node: Node) -> None:
    async with app_on(node.url) as app, await aio_pika.connect(node.url) as operator:
        (say,) = app.tasks
        await say.enqueue("before")
        channel = await operator.channel()
        await channel.queue_delete("work")
        await say.enqueue("after")
        await holds(node, 1)
        adopting = App(node.url, queues=[Queue("work", create=False)])
        adopted = adopting.task(queue="work")(say.function)
        await adopted.enqueue("adopted")
        await channel.queue_delete("work")
        with pytest.raises(QueueNotFound, match="no queue 'work'"):
            await adopted.enqueue("x")
        await adopting.close()


async def test_a_deleted_queue_is_missed_by_what_is_delayed(node: Node) -> None:
    """Its delay queue is to be made, and there is nothing to make it for: nothing of the call is lost."""
    broker, adopting = connect(node.url, timeout=20.0), connect(node.url, timeout=20.0)
    async with await aio_pika.connect(node.url) as operator:
        channel = await operator.channel()
        await broker.declare([Queue("work"), Queue("other")])
        await channel.queue_delete("work")
        delayed = Envelope(new_id(), "work", "say", b"{}", due=time.time() + 60)
        await broker.publish([delayed, Envelope(new_id(), "other", "say", b"{}")])
        await holds(node, 1, "other")
        (stats,) = await broker.queues.stats(["work"])
        assert (stats.ready, stats.delayed) == (0, 1)
        await adopting.declare([Queue("work", create=False)])
        await channel.queue_delete("work")
        later = Envelope(new_id(), "work", "say", b"{}", due=time.time() + 600)
        with pytest.raises(QueueNotFound, match="'work' does not exist") as caught:
            await adopting.publish([later])
        assert caught.value.ids == (later.id,)
    await broker.close()
    await adopting.close()


async def test_a_closed_broker_stays_closed(node: Node) -> None:
    """What is being published meanwhile is an error at once, and opens no connection that nobody would close."""
    with Proxy(node.port) as proxy:
        broker = connect(proxy.url, timeout=20.0)
        await broker.declare([Queue("work")])
        envelopes = [Envelope(new_id(), "work", "say", b"x" * 200_000) for _ in range(100)]
        publishing = asyncio.create_task(broker.publish(envelopes))
        await until(lambda: confirmed(broker), "some of them are stored")
        await broker.close()
        with pytest.raises(EnqueueTimeout, match="closed by this program before RabbitMQ confirmed") as caught:
            await publishing
        assert 0 < len(caught.value.ids) < 100
        with pytest.raises(BrokerUnavailable, match="closed by this program; nothing was stored"):
            await broker.publish(envelopes[:1])
        assert proxy.accepted == 1


async def confirmed(broker: Broker) -> bool:
    assert isinstance(broker, RabbitMQBroker)
    assert broker._publisher._channel is not None
    tracker = broker._publisher._channel.tracker
    return tracker._last_tag > len(tracker._sent)


@pytest.mark.parametrize(
    ("declared", "found"),
    [
        ({"durable": False, "exclusive": False}, "durable=False"),
        ({"durable": True, "auto_delete": True}, "auto_delete=True"),
        ({"durable": True, "arguments": {"x-queue-type": "stream"}}, "x-queue-type='stream'"),
        ({"exclusive": True}, "exclusive=True"),
    ],
)
async def test_a_queue_that_cannot_be_used_is_an_error(node: Node, declared: Mapping[str, Any], found: str) -> None:
    """With both sets of arguments, and nothing half-declared."""
    async with await aio_pika.connect(node.url) as operator:
        channel = await operator.channel()
        await channel.declare_queue("work", **declared)
        broker = connect(node.url)
        with pytest.raises(QueueMismatch) as caught:
            await broker.declare([Queue("other"), Queue("work")])
        assert found in str(caught.value)
        assert "wanted {" in str(caught.value)
        await broker.close()
        probe = await operator.channel()
        with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
            await probe.declare_queue("other", passive=True)
        await channel.queue_delete("work")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"x-queue-type": "classic"}, {"x-max-priority": 10}, {"x-message-ttl": 600_000, "x-max-length": 50}],
)
async def test_an_existing_queue_is_adopted(
    node: Node, arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Classic ones too, whatever their arguments; what they lack is logged."""
    async with await aio_pika.connect(node.url) as operator:
        channel = await operator.channel()
        await channel.declare_queue("work", durable=True, arguments=arguments)
        async with app_on(node.url) as app:
            await app.tasks[0].enqueue("x")
            await holds(node, 1)
    assert "it is a classic queue" in caplog.text
    assert ("x-message-ttl=600000 lets RabbitMQ drop tasks" in caplog.text) == ("x-message-ttl" in arguments)


async def test_a_user_without_rights_is_told(node: Node) -> None:
    """403 on declaring; a user who may only write can still publish to a queue that is there."""
    node.ctl("add_user", "poor", "p")
    node.ctl("set_permissions", "poor", "^$", ".*", "^$")
    try:
        url = node.url.replace("guest:guest", "poor:p")
        broker = connect(url)
        with pytest.raises(BrokerRefused, match="ACCESS_REFUSED"):
            await broker.declare([Queue("work")])
        rich = connect(node.url)
        await rich.declare([Queue("work")])
        await broker.publish([Envelope(new_id(), "work", "say", b"{}")])
        await broker.close()
        await rich.close()
        await holds(node, 1)
    finally:
        node.ctl("delete_user", "poor")
