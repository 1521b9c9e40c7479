"""aio-pika by hand, as its documentation shows it: the least that a program of one's own would do."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import aio_pika

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce, queue, url

if TYPE_CHECKING:
    from aio_pika.abc import AbstractIncomingMessage

_QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}


async def enqueue(order: Order) -> None:
    async with await aio_pika.connect(url()) as connection:
        channel = await connection.channel(on_return_raises=True)
        await channel.declare_queue(queue(), durable=True, arguments=_QUORUM)

        async def send(task: int) -> None:
            body = json.dumps({"args": [task]}).encode()
            message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT, type="noop")
            await channel.default_exchange.publish(message, routing_key=queue())

        await produce(send, order)


async def on_message(message: AbstractIncomingMessage) -> None:
    note_run(json.loads(message.body)["args"][0])
    await message.ack()


async def work() -> None:
    async with await aio_pika.connect(url()) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=256)
        declared = await channel.declare_queue(queue(), durable=True, arguments=_QUORUM)
        await declared.consume(on_message)
        await asyncio.Future()


if __name__ == "__main__":
    asyncio.run(work() if sys.argv[1] == "work" else enqueue(Order.read()))
