"""Queues that are deleted while somebody consumes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import aio_pika

from leveret import Queue
from leveret.brokers import connect
from leveret.model import Envelope, new_id

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

    from tests.support.nodes import Node


async def take(_: AbstractIncomingMessage) -> None:
    """Whatever comes."""


async def test_a_queue_goes_with_the_consumer_of_another_program(node: Node) -> None:
    """Nobody makes it again, so there is nothing to count in it afterwards."""
    broker = connect(node.url, timeout=20.0)
    await broker.declare([Queue("work")])
    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()
        queue = await channel.get_queue("work", ensure=False)
        await queue.consume(take, no_ack=True)
        removed = await broker.queues.delete("work", force=True)
    assert removed.kept
    assert await broker.queues.stats(["work"]) == []
    await broker.declare([Queue("work")])
    await broker.publish([Envelope(new_id(), "work", "say", b"{}")])
    await broker.close()
