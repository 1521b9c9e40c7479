"""What goes wrong by the thousand at once is a line or two in the log, with how often it was."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from leveret import App, BrokerError, LeveretError, Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq import holding
from leveret.model import DeadLettered, Envelope, new_id
from leveret.testing.bench import Taken
from tests.support.proxy import Proxy
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from leveret import Task
    from tests.support.nodes import Node

MANY = 1_000
#: More than there are kinds of line, and far fewer than there are errors.
FEW = 12


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("when", ["before they are stored", "before they are told"])
async def test_a_frozen_broker(node: Node, caplog: pytest.LogCaptureFixture, when: str) -> None:
    """Each enqueue is an error, or each is stored and nobody hears of it."""
    with Proxy(node.port) as proxy:
        app = App(proxy.url, enqueue_timeout=2.0, queues=[Queue("work")])

        @app.task(queue="work")
        async def say(text: str) -> None: ...

        await until(lambda: is_stored(say), "the connection is there and the queue declared")
        if when == "before they are told":
            proxy.swallow_from(b"leveret.events")
        else:
            proxy.swallow()
        results: list[object] = []
        for _ in range(4):
            results += await asyncio.gather(*(say.enqueue("x") for _ in range(MANY // 4)), return_exceptions=True)
        assert len(results) == MANY
        proxy.resume()
        proxy.cut()
        await app.close()
    assert len(lines(caplog)) <= FEW, lines(caplog)


async def is_stored(task: Task[[str], None]) -> bool:
    """The timeout is short, and the first enqueue of a program has much to do."""
    with suppress(BrokerError):
        await task.enqueue("first")
        return True
    return False


async def test_outcomes_that_cannot_be_stored(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is held and tried again; now and then a line says how many there are."""
    monkeypatch.setattr(holding, "REMIND", 5.0)
    broker = connect(node.url, timeout=1.0)
    await broker.declare([Queue("work")])
    await broker.publish([Envelope(new_id(), "work", "say", b"{}", enqueued_at=1.0) for _ in range(MANY)])
    policy = '{"max-length": 0, "overflow": "reject-publish"}'
    async with broker.consume([Queue("work")], credit=MANY) as consumer:
        taken = Taken(consumer)
        deliveries = await taken.next(MANY)
        await asyncio.to_thread(node.ctl, "set_policy", "no", r"^work\.dead$", policy, "--apply-to", "queues")
        try:
            settling = asyncio.create_task(broker.settle([(delivery, DeadLettered("no")) for delivery in deliveries]))
            await until(lambda: told(caplog, " more cannot be stored in queue 'work.dead'"), "they are counted")
        finally:
            await asyncio.to_thread(node.ctl, "clear_policy", "no")
        settling.cancel()
        await asyncio.gather(settling, return_exceptions=True)
        taken.abandon()
    await broker.close()
    assert len(lines(caplog)) <= FEW, lines(caplog)


async def told(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return any(text in line for line in lines(caplog))


async def test_a_file_that_stays_locked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "leveret.db"
    app = App(f"sqlite:///{path}", enqueue_timeout=0.5, queues=[Queue("work")])

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    await say.enqueue("first")
    broker = connect(app.url, timeout=0.5)
    async with broker.consume([Queue("work")], credit=1):
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for _ in range(4):
            results = await asyncio.gather(*(say.enqueue("x") for _ in range(MANY // 4)), return_exceptions=True)
            assert all(isinstance(result, LeveretError) for result in results)
        other.execute("ROLLBACK")
        other.close()
    await app.close()
    await broker.close()
    assert len(lines(caplog)) <= FEW, lines(caplog)
