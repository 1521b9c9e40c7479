"""The permissions that docs/operations.md gives are enough."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aio_pika
import aio_pika.abc
import pytest
from aiormq.exceptions import ChannelAccessRefused

from leveret import App, BrokerError, Queue
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import until
from tests.support.workers import Ledger, Program, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.nodes import Node

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


def permissions(who: str) -> list[str]:
    """The documented expressions to configure, write and read, for the queues of the tests' application."""
    (row,) = [line for line in OPERATIONS.read_text().splitlines() if line.startswith(f"| {who} | `")]
    found = [
        text.replace("\\|", "|").replace("mail|images", "work|other|raw") for text in re.findall(r"`([^`]+)`", row)
    ]
    assert len(found) == 3
    return found


def test_workers_and_producers_get_by(node: Node, ledger: Ledger) -> None:
    for who in ("worker", "producer"):
        node.ctl("add_user", who, who)
    try:
        node.ctl("set_permissions", "worker", *permissions("a worker"))
        node.ctl("set_permissions", "producer", *permissions("a producer"))
        urls = {who: node.url.replace("guest:guest", f"{who}:{who}") for who in ("worker", "producer")}
        with Worker(urls["worker"], ledger).ready() as worker:
            client = Client(urls["producer"])
            client.enqueue(ledger_app.say, "a")
            client.enqueue(ledger_app.not_now, "b")
            client.enqueue(ledger_app.give_up, "c")
            ledger.wait_for("said a")
            ledger.wait_for("end b")
            worker.wait_for("gave up: c")
            leveret("queues", "pause", "work", "--url", urls["worker"])
            worker.wait_for("paused queues, of which nothing is started: work")
            leveret("queues", "resume", "work", "--url", urls["worker"])
            worker.wait_for("none any more")
            done = client.enqueue(ledger_app.measure, 1, 2)
            url = ("--url", urls["producer"])
            assert leveret("result", done, "--wait", *url) == '{"width":1,"height":2}\n'
            later = client.enqueue(ledger_app.say.options(delay=60), "later")
            assert "cancelled before it ran" in leveret("cancel", later, *url)
            assert "ermission" not in worker.output
            # Other tests' queues have limits: it may not read what waits there, and says so.
            refused = [line for line in worker.output.splitlines() if "REFUSED" in line and ".gate" not in line]
            assert not refused
        assert Client(node.url).stats("work").dead == 1
    finally:
        for who in ("worker", "producer"):
            node.ctl("delete_user", who)


def test_an_operator_gets_by(node: Node, ledger: Ledger) -> None:
    """Each command of one, on a queue with a dead letter."""
    node.ctl("add_user", "operator", "operator")
    url = ("--url", node.url.replace("guest:guest", "operator:operator"))
    try:
        node.ctl("set_permissions", "operator", *permissions("an operator"))
        client = Client(node.url)
        with Worker(node.url, ledger).ready() as worker:
            first, second = (client.enqueue(ledger_app.give_up, text) for text in "ab")
            client.wait_until_dead("work", 2)
            assert "work" in leveret("queues", "-q", "work", *url)
            assert first in leveret("dead", "list", "work", *url)
            assert "gave up" in leveret("dead", "show", "work", first, *url)
            leveret("queues", "pause", "work", *url)
            worker.wait_for("paused queues, of which nothing is started: work")
            leveret("dead", "retry", "work", first, *url)
            leveret("dead", "drop", "work", second, *url)
            client.wait_until_counts("work", ready=1, dead=0)
            leveret("queues", "resume", "work", *url)
            client.wait_until_dead("work", 1)
    finally:
        node.ctl("delete_user", "operator")


def test_a_producer_may_delay(node: Node, ledger: Ledger) -> None:
    node.ctl("add_user", "producer", "producer")
    try:
        Client(node.url).enqueue(ledger_app.say, "a")  # the worker's part: the queue is there
        node.ctl("set_permissions", "producer", *permissions("a producer"))
        app = ledger.path.with_name("delaying.py")
        app.write_text(
            "import asyncio\nfrom tests.support import ledger_app\n"
            "asyncio.run(ledger_app.say.options(delay=1).enqueue('b'))\n"
        )
        url = node.url.replace("guest:guest", "producer:producer")
        environment = {"LEVERET_URL": url, "PYTHONPATH": str(OPERATIONS.parents[1]), "LEDGER": str(ledger.path)}
        with Program([str(app)], ledger.path.with_name("delaying.log"), environment) as program:
            assert program.exit_code() == 0, program.output
        with Worker(node.url, ledger):
            ledger.wait_for("said b")
    finally:
        node.ctl("delete_user", "producer")


async def test_a_producer_that_only_enqueues_can_do_no_more(node: Node, ledger: Ledger) -> None:
    node.ctl("add_user", "minimal", "minimal")
    node.ctl("set_permissions", "minimal", *permissions("a producer that only enqueues"))
    url = node.url.replace("guest:guest", "minimal:minimal")
    app = App(url, queues=[Queue("work")], enqueue_timeout=20)

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    try:
        with Worker(node.url, ledger) as worker:
            worker.ready()
            async with app:
                handle = await say.enqueue("a")
                await asyncio.to_thread(ledger.wait_for, "said a")
                for ask in (handle.status, handle.cancel, lambda: app.client.broker.queues.pause("work")):
                    with pytest.raises(BrokerError):
                        await ask()
            async with await aio_pika.connect(url) as connection:
                for name, act in _FORBIDDEN.items():
                    channel = await connection.channel()
                    try:
                        await act(channel)
                    except ChannelAccessRefused:
                        continue
                    pytest.fail(f"{name} was not refused")
    finally:
        node.ctl("delete_user", "minimal")


async def _reads(channel: aio_pika.abc.AbstractChannel, name: str, **arguments: Any) -> None:
    await channel.set_qos(10)
    queue = await channel.get_queue(name, ensure=False)

    async def take(_: object) -> None: ...

    await queue.consume(take, arguments=arguments)


_FORBIDDEN: dict[str, Callable[[aio_pika.abc.AbstractChannel], Awaitable[object]]] = {
    "to read tasks": lambda channel: _reads(channel, "work"),
    "to read dead letters": lambda channel: _reads(channel, "work.dead"),
    "to read statuses": lambda channel: _reads(channel, "leveret.events", **{"x-stream-offset": "first"}),
    "to delete dead letters": lambda channel: channel.queue_delete("work.dead"),
    "to delete statuses": lambda channel: channel.queue_delete("leveret.events"),
    "to make a queue": lambda channel: channel.declare_queue("mine", durable=True),
    "to make the stream of cancellations": lambda channel: channel.declare_queue(
        "leveret.cancelled", durable=True, arguments={"x-queue-type": "stream"}
    ),
}


async def test_the_virtual_host_is_the_border(node: Node, ledger: Ledger) -> None:
    """What docs/security.md says that whoever may publish can do: the default exchange leads to every queue."""
    node.ctl("add_user", "minimal", "minimal")
    node.ctl("set_permissions", "minimal", *permissions("a producer that only enqueues"))
    try:
        with Worker(node.url, ledger) as worker:
            worker.ready()
            ledger_app.app.client.connect_to(node.url)
            async with (
                ledger_app.app,
                await aio_pika.connect(node.url.replace("guest:guest", "minimal:minimal")) as connection,
            ):
                exchange = (await connection.channel()).default_exchange

                async def put(queue: str, content: object, **properties: str) -> None:
                    await exchange.publish(aio_pika.Message(json.dumps(content).encode(), **properties), queue)  # type: ignore[arg-type]

                handle = ledger_app.app.handle("forged")
                await (await ledger_app.say.enqueue("ours")).result(30)  # the stream is there
                await put("work", {"args": ["theirs"]}, type="say", message_id="run")
                await asyncio.to_thread(ledger.wait_for, "said theirs")
                update = {"id": "forged", "state": "succeeded", "at": time.time(), "queue": "other", "result": "forged"}
                await put("leveret.events", {"v": 1, "updates": [update]})
                assert await handle.result(30) == "forged"
                await put("work.dead", {"args": []}, type="say", message_id="letter")

                async def is_dead() -> bool:
                    letters = await ledger_app.app.client.broker.dead_letters.read("work", limit=5)
                    return [one.envelope.id for one in letters] == ["letter"]

                await until(is_dead, "the forged dead letter is there")
    finally:
        node.ctl("delete_user", "minimal")


async def test_a_cancellation_from_the_future_is_ignored(node: Node, ledger: Ledger) -> None:
    """It would end what nobody has enqueued yet; one from a clock that is a little ahead counts."""
    ledger_app.app.client.connect_to(node.url)
    async with ledger_app.app:
        await ledger_app.say.options(id="first", delay=60).enqueue("never")
        await ledger_app.app.handle("first").cancel()  # the stream is there
        with Worker(node.url, ledger) as worker:
            worker.ready()
            async with await aio_pika.connect(node.url) as connection:
                channel = await connection.channel()
                marks = [["invoice-1", time.time() + 3_600], ["invoice-2", time.time() + 10]]
                body = json.dumps({"v": 1, "marks": marks}).encode()
                await channel.default_exchange.publish(aio_pika.Message(body), "leveret.cancelled")
            await asyncio.to_thread(worker.wait_for, "a cancellation from more than 30 s in the future is ignored")
            await ledger_app.say.options(id="invoice-2").enqueue("cancelled")
            await ledger_app.say.options(id="invoice-1").enqueue("paid")
            await asyncio.to_thread(ledger.wait_for, "said paid")
            await asyncio.to_thread(worker.wait_for, "invoice-2: cancelled before it ran")
