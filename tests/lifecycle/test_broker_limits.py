"""Limits of a virtual host or a user: they pass, so they are waited for, and named for what they are."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret import App, BrokerRefused, BrokerUnavailable, Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import Hosts
from leveret.brokers.rabbitmq.amqp import connections as amqp
from tests.support.waiting import until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from tests.support.nodes import Node

CONNECTIONS = {
    "vhost": ("set_vhost_limits", '{"max-connections": 1}'),
    "user": ("set_user_limits", "guest", '{"max-connections": 1}'),
}
OTHERS = {
    "channels": ("set_user_limits", "guest", '{"max-channels": 1}'),
    "no channels": ("set_user_limits", "guest", '{"max-channels": 0}'),
    "queues": ("set_vhost_limits", '{"max-queues": 0}'),
}


@asynccontextmanager
async def limited(node: Node, *command: str) -> AsyncGenerator[None]:
    await asyncio.to_thread(node.ctl, *command)
    try:
        if command in CONNECTIONS.values():
            await until(lambda: refuses(node), "the server counts the connection that there is")
        yield
    finally:
        await asyncio.to_thread(unlimit, node, command)


async def refuses(node: Node) -> bool:
    """RabbitMQ 3.10 counts a connection a moment after it has let it in. On a busy machine one may fail otherwise."""
    try:
        _, extra = await amqp.connect(Hosts(node.url, timeout=20.0), purpose="one more")
    except BrokerUnavailable as error:
        return "limit" in str(error)
    await amqp.close(extra)
    return False


def unlimit(node: Node, command: Sequence[str]) -> None:
    """The command line finds an error in there being nothing to clear."""
    with suppress(RuntimeError):
        node.ctl(
            *(["clear_vhost_limits"] if command[0] == "set_vhost_limits" else ["clear_user_limits", "guest", "all"])
        )


def app_on(node: Node, timeout: float) -> App:
    app = App(node.url, enqueue_timeout=timeout, queues=[Queue("work")])

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    return app


@pytest.mark.parametrize("whose", CONNECTIONS)
async def test_a_connection_limit_is_waited_for(node: Node, whose: str, caplog: pytest.LogCaptureFixture) -> None:
    """An enqueue succeeds when another connection has gone, and says in between why it waits."""
    other = await aio_pika.connect(node.url)
    async with limited(node, *CONNECTIONS[whose]):
        app = app_on(node, 60.0)
        enqueuing = asyncio.create_task(app.tasks[0].enqueue("a"))
        await until(lambda: said(caplog, "connection limit (1) is reached", enqueuing), "it says why")
        assert not enqueuing.done(), caplog.text
        await other.close()
        await enqueuing
        await app.close()


async def said(caplog: pytest.LogCaptureFixture, text: str, enqueuing: asyncio.Task[object]) -> bool:
    return text in caplog.text or enqueuing.done()


@pytest.mark.parametrize("whose", CONNECTIONS)
async def test_a_connection_limit_that_stays_is_named(node: Node, whose: str) -> None:
    async with await aio_pika.connect(node.url), limited(node, *CONNECTIONS[whose]):
        app = app_on(node, 5.0)
        with pytest.raises(BrokerUnavailable, match=r"connection limit \(1\) is reached; close other") as caught:
            await app.tasks[0].enqueue("a")
        assert "does it exist" not in str(caught.value)
        await app.close()


@pytest.mark.parametrize("what", OTHERS)
async def test_other_limits_are_waited_for_and_named(node: Node, what: str) -> None:
    async with limited(node, *OTHERS[what]):
        broker = connect(node.url, timeout=10.0)
        with pytest.raises(BrokerUnavailable, match=r"limit .*close other connections, or have the limit raised"):
            await broker.declare([Queue("work")])
    await broker.declare([Queue("work")])
    await broker.close()


@pytest.mark.parametrize("whose", CONNECTIONS)
async def test_a_worker_waits_for_its_connection(node: Node, ledger: Ledger, whose: str) -> None:
    other = await aio_pika.connect(node.url)
    async with limited(node, *CONNECTIONS[whose]):
        with Worker(node.url, ledger) as worker:
            await until(lambda: tried(worker, 5), "it was refused more often than it stands a real refusal")
            assert "connection limit (1) is reached" in worker.output
            assert worker.process.poll() is None
            await asyncio.to_thread(unlimit, node, CONNECTIONS[whose])
            await asyncio.to_thread(worker.ready)
        await other.close()


async def tried(worker: Worker, times: int) -> bool:
    return worker.output.count("trying again") >= times


async def test_a_virtual_host_that_is_missing_is_a_refusal(node: Node) -> None:
    """In the server's own words."""
    broker = connect(f"{node.url}nowhere", timeout=20.0)
    with pytest.raises(BrokerRefused, match="vhost nowhere not found; the virtual host is the URL's path"):
        await broker.declare([Queue("work")])
    await broker.close()


async def test_an_alarm_is_named_by_whoever_asks(node: Node) -> None:
    """Not only by an enqueue: RabbitMQ reads nothing more of a connection that has published."""
    async with app_on(node, 2.0) as app:
        await app.tasks[0].enqueue("before")
        await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            with pytest.raises(TimeoutError):
                await app.tasks[0].enqueue("during")
            with pytest.raises(BrokerUnavailable, match=r"takes nothing on this connection now .*alarm"):
                await app.client.broker.declare([Queue("other")])
        finally:
            await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", "2GB")


async def test_a_question_during_an_alarm_takes_as_long_as_it_says(node: Node) -> None:
    """``leveret queues`` said that it was not possible within 2 s, after 12."""
    broker = connect(node.url, timeout=30.0)
    await broker.declare([Queue("work")])
    await broker.queues.stats(["work"])
    await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(BrokerUnavailable, match=r"within \d+(\.\d)? s: .*alarm") as caught:
                await broker.queues.stats(["work"])
            took = time.monotonic() - began
            told = re.search(r"within ([\d.]+) s", str(caught.value))
            assert told is not None
            assert abs(took - float(told[1])) < 1.0
            assert took < 15.0
    finally:
        await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", "2GB")
    await broker.close()
