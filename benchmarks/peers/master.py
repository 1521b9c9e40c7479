"""aio_pika.patterns.Master, with its own settings: pickled arguments, durable, confirmed, late acks."""

from __future__ import annotations

import asyncio
import sys

import aio_pika
from aio_pika.patterns import Master

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce, queue, url

_QUORUM = {"x-queue-type": "quorum"}


async def noop(*, task: int) -> None:
    note_run(task)


async def enqueue(order: Order) -> None:
    async with await aio_pika.connect_robust(url()) as connection:
        channel = await connection.channel()
        await channel.declare_queue(queue(), durable=True, arguments=_QUORUM)
        master = Master(channel)

        async def send(task: int) -> None:
            await master.create_task(queue(), kwargs={"task": task})

        await produce(send, order)


async def work() -> None:
    async with await aio_pika.connect_robust(url()) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=256)
        await Master(channel).create_worker(queue(), noop, durable=True, arguments=_QUORUM)
        await asyncio.Future()


if __name__ == "__main__":
    asyncio.run(work() if sys.argv[1] == "work" else enqueue(Order.read()))
