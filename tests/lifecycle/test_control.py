"""What tells RabbitMQ workers of a pause and of a cancellation, when an operator deletes it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers.rabbitmq.queues.topology import CONTROL_EXCHANGE
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.support.nodes import Node

PAUSED = "paused queues, of which nothing is started: work"
GOES_ON = "paused queues, of which nothing is started: none any more"
MENDED = "the exchange or the queue by which workers are told was deleted; made again"


def delete_exchange(node: Node, name: str = CONTROL_EXCHANGE) -> None:
    async def delete() -> None:
        async with await aio_pika.connect(node.url) as connection:
            await (await connection.channel()).exchange_delete(name)

    asyncio.run(delete())


def delete_control_queues(node: Node) -> None:
    for row in node.queues("name"):
        if row["name"].startswith("amq.gen"):
            node.evaluate(
                f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{row["name"]}">>)), '
                'rabbit_amqqueue:delete(Q, false, false, <<"operator">>).'
            )


def bound(node: Node) -> int:
    rows = json.loads(node.ctl("list_bindings", "source_name", "--formatter", "json"))
    return sum(row["source_name"] == CONTROL_EXCHANGE for row in rows)


@pytest.mark.parametrize("what", ["queue", "exchange", "exchange that is made again"])
def test_what_tells_workers_is_deleted(node: Node, ledger: Ledger, what: str) -> None:
    """A pause and a cancellation are heeded all the same, and the connection stays."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "first")
    with Worker(node.url, ledger, "--concurrency", "2") as worker:
        ledger.wait_for("said first")
        (held,) = client.enqueue_many(ledger_app.held, [("a",)])
        ledger.wait_for("start a")
        if what == "queue":
            delete_control_queues(node)
            worker.wait_for(MENDED)
        else:
            delete_exchange(node)
            if "again" in what:  # the next who asks makes it, and nothing is bound to it
                assert client.stats("work").ready == 0
        leveret("queues", "pause", "work", "--url", node.url)
        worker.wait_for(PAUSED)
        client.enqueue(ledger_app.say, "second")
        if what == "exchange":
            delete_exchange(node)
        leveret("status", held, "--url", node.url)
        leveret("cancel", held, "--timeout", "60", "--url", node.url)
        wait_until(lambda: client.stats("work").running == 0, "what ran was cancelled")
        assert ledger.count("end a") == 0
        wait_until(lambda: bound(node) == 1, "the worker is told again")
        leveret("queues", "resume", "work", "--url", node.url)
        ledger.wait_for("said second")
        assert "connected to RabbitMQ again" not in worker.output
