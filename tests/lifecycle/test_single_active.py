"""Queues that deal to one consumer alone, as their operator declared them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.support.nodes import Node

PAUSED = "paused queues, of which nothing is started: work"
GOES_ON = "paused queues, of which nothing is started: none any more"


def declare(node: Node, arguments: dict[str, Any]) -> None:
    async def run() -> None:
        async with await aio_pika.connect(node.url) as connection:
            await (await connection.channel()).declare_queue("work", durable=True, arguments=arguments)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["quorum", "classic"])
@pytest.mark.parametrize("busy", [3, 4])
def test_all_slots_are_used_after_a_pause(node: Node, ledger: Ledger, kind: str, busy: int) -> None:
    """While tasks from before it run, and when they have ended; with all slots busy too, and after another pause."""
    declare(node, {"x-queue-type": kind, "x-single-active-consumer": True})
    client = Client(node.url)
    client.enqueue_many(ledger_app.held, [(f"old-{number}",) for number in range(busy)])
    with Worker(node.url, ledger, "--concurrency", "4") as worker:
        ledger.wait_for("start old", busy)
        for again in range(2):
            leveret("queues", "pause", "work", "--url", node.url)
            worker.wait_for(PAUSED, again + 1)
            leveret("queues", "resume", "work", "--url", node.url)
            worker.wait_for(GOES_ON, again + 1)
        client.enqueue_many(ledger_app.held, [(f"new-{number}",) for number in range(4)])
        if busy < 4:
            ledger.wait_for("start new", 4 - busy)
        for number in range(busy):
            ledger.release(f"old-{number}")
        ledger.wait_for("start new", 4)
        for number in range(4):
            ledger.release(f"new-{number}")
        ledger.wait_for("end", busy + 4)
        client.wait_until_empty("work")
