"""What real workers and their children tell of themselves, and a watch that outlives its connection."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import TYPE_CHECKING

import pytest

from leveret import Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.model import Envelope, new_id
from leveret.model.status import enqueued
from tests.support import ledger_app
from tests.support.proxy import Proxy
from tests.support.waiting import until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from leveret.model.reports import ChildReport, WorkerReport
    from tests.conftest import Place
    from tests.support.nodes import Node


async def test_children_are_seen(place: Place, ledger: Ledger) -> None:
    """Each with its process id, its memory and what it runs since when; a stopping worker too, until it has ended."""
    began = time.time()
    with Worker(place.url, ledger, "--processes", "2", "--concurrency", "1").ready() as worker:
        ledger_app.app.client.connect_to(place.url)
        texts = ["a", "b"]
        handles = [await ledger_app.pause.enqueue(text, 60.0) for text in texts]
        broker = connect(place.url)

        async def report(busy: int) -> WorkerReport | None:
            found = [one for one in await broker.control.workers() if one.name.endswith(f":{worker.pid}")]
            return next((one for one in found if sum(len(child.running) for child in one.children) == busy), None)

        told = await until(lambda: report(2), "both run")
        assert told is not None
        assert sorted(told.queues) == sorted(queue.name for queue in ledger_app.app.queues)
        pids = {ledger.wait_for(f"start {text}").split()[-1] for text in texts}
        assert {str(child.pid) for child in told.children} == pids
        assert {_only(child) for child in told.children} == {(ledger_app.pause.name, handle.id) for handle in handles}
        assert all(child.rss > 1_000_000 for child in told.children)
        assert all(began - 1 <= child.running[0].since <= time.time() + 1 for child in told.children)
        assert {status.id for status in await broker.statuses.recent(50)} >= {handle.id for handle in handles}
        worker.process.terminate()
        worker.wait_for("stopping")
        assert await until(lambda: report(2), "it tells while it stops")
        worker.process.terminate()
        assert worker.exit_code() == 0
        assert await report(2) is None
        await broker.close()
        await ledger_app.app.close()


def _only(child: ChildReport) -> tuple[str | None, str]:
    (running,) = child.running
    return running.task, running.id


async def test_a_watch_outlives_its_connection(node: Node) -> None:
    """What happens while it is cut off is read when it is back."""
    queue = Queue(f"watched-{new_id()}")
    direct = connect(node.url)
    await direct.declare([queue])

    async def publish() -> str:
        envelope = Envelope(new_id(), queue.name, "say", b"{}", enqueued_at=time.time())
        await direct.publish([envelope])
        await direct.statuses.notify([enqueued(envelope, time.time())])
        return envelope.id

    with Proxy(node.port) as proxy:
        broker = connect(proxy.url)
        seen: set[str] = set()
        async with broker.statuses.watch() as updates, asyncio.timeout(60):
            wanted = {await publish()}
            for _ in range(3):
                while not wanted <= seen:
                    seen |= {status.id for status in await anext(updates)}
                proxy.cut()
                wanted |= {await publish() for _ in range(5)}
            while not wanted <= seen:
                seen |= {status.id for status in await anext(updates)}
        await broker.close()
    await direct.close()


async def test_a_question_that_is_given_up_leaves_nothing_open(node: Node) -> None:
    broker = RabbitMQBroker(node.url, timeout=20)
    assert await broker.control.workers() == []
    connection = await broker._publisher.connection()
    broker._bus._workers = 9  # it waits for as many answers as came the last time, and they do not come
    before = _open_channels(connection)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(broker.control.workers(), 0.7)
    assert _open_channels(connection) == before
    assert await broker.control.workers() == []
    await broker.close()


async def test_questions_leave_nothing_behind(node: Node) -> None:
    """Whoever watches queues asks for years on one connection, and each question opens channels."""
    broker = RabbitMQBroker(node.url, timeout=20)
    connection = await broker._publisher.connection()

    async def objects(channels: int) -> int:
        for _ in range(channels):
            await (await amqp.open_channel(connection, confirms=False)).close()
        gc.collect()
        return len(gc.get_objects())

    await objects(50)
    before = await objects(50)
    # What asyncio keeps of timeouts that are over goes by itself.
    assert (await objects(300) - before) / 300 < 5
    await broker.close()


def _open_channels(connection: amqp.Connection) -> int:
    assert connection.transport is not None
    return sum(channel is not None for channel in connection.transport.connection.channels.values())
