"""Looking at waiting tasks on RabbitMQ: what it costs, and where it is refused."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from leveret import PeekRefused
from leveret.brokers import connect
from leveret.model import Envelope, Queue, new_id
from leveret.testing.bench import Taken, text
from tests.support.workers import leveret

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker
    from tests.support.nodes import Node

QUEUE = Queue("work")


def task(text: str, **more: float) -> Envelope:
    return Envelope(new_id(), "work", "check", text.encode(), **more)  # type: ignore[arg-type]


def is_old(node: Node) -> bool:
    return node.version == "3.10"


async def _filled(node: Node, texts: Sequence[str]) -> Broker:
    broker = connect(node.url, timeout=20.0)
    await broker.declare([QUEUE])
    await broker.publish([task(one) for one in texts])
    return broker


async def test_an_old_quorum_queue_is_not_looked_into(node: Node) -> None:
    """A look would count as a return, and move what it looked at. The command says so, and what to use."""
    if not is_old(node):
        pytest.skip("since 4.3 a look does neither")
    broker = await _filled(node, "abc")
    with pytest.raises(PeekRefused, match=r"RabbitMQ 3\.10.* ready in queue 'work'.*before RabbitMQ 4\.3"):
        await broker.queues.peek("work", "ready", limit=2)
    async with broker.consume([QUEUE], credit=3) as consumer:
        taken = Taken(consumer)
        deliveries = await taken.next(3)
        assert [(text(one), one.returns) for one in deliveries] == [("a", 0), ("b", 0), ("c", 0)]
        taken.abandon()
    await broker.close()
    await asyncio.to_thread(leveret, "tasks", "list", "work", "--url", node.url, fails=True)


async def test_what_is_delayed_is_not_looked_at(node: Node) -> None:
    broker = await _filled(node, "")
    await broker.publish([task("later", due=time.time() + 600)])
    with pytest.raises(PeekRefused, match="would make some of it late"):
        await broker.queues.peek("work", "delayed", limit=2)
    await broker.close()


async def test_more_than_a_look_holds_stay_in_their_order(node: Node) -> None:
    """Looks of several sizes, while the queue's beginning is taken away: nothing is lost, counted, or out of order."""
    if is_old(node):
        pytest.skip("refused there")
    names = [str(number) for number in range(250)]
    broker = await _filled(node, names)
    seen: list[str] = []
    async with await aio_pika.connect(node.url) as connection:
        queue = await (await connection.channel()).get_queue("work")
        for limit in (1, 32, 7, 1_000, 3, 20, 32, 5):
            shown = [one.body.decode() for one in await broker.queues.peek("work", "ready", limit=limit)]
            assert shown == names[len(seen) : len(seen) + min(limit, 32)]
            for _ in range(7):
                message = await queue.get(no_ack=True)
                assert message is not None
                seen.append(message.body.decode())
                assert not message.headers.get("x-delivery-count")
        while rest := await queue.get(no_ack=True, fail=False):
            seen.append(rest.body.decode())
    assert seen == names
    await broker.close()


async def test_a_look_that_is_cut_off_loses_nothing(node: Node) -> None:
    if is_old(node):
        pytest.skip("refused there")
    names = [str(number) for number in range(300)]
    broker = await _filled(node, names)
    for turn in range(10):
        looking = asyncio.create_task(broker.queues.peek("work", "ready", limit=100))
        await asyncio.sleep(0.005 * turn)
        looking.cancel()
        await asyncio.wait([looking])
    async with broker.consume([QUEUE], credit=None) as consumer:
        taken = Taken(consumer)
        assert sorted(await taken.texts(300), key=int) == names
        taken.abandon()
    await broker.close()


async def test_a_queue_with_a_single_active_consumer_is_not_looked_into(node: Node) -> None:
    async with await aio_pika.connect(node.url) as connection:
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-single-active-consumer": True}
        await (await connection.channel()).declare_queue("work", durable=True, arguments=arguments)
    broker = connect(node.url, timeout=20.0)
    await broker.publish([task("a")])
    with pytest.raises(PeekRefused, match="quorum queue" if is_old(node) else "single active consumer"):
        await broker.queues.peek("work", "ready", limit=1)
    await broker.close()
