"""FastStream: a quorum queue, persistent messages, confirmed, acknowledged after the run."""

from __future__ import annotations

import asyncio
import sys

from faststream import AckPolicy, FastStream
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitQueue

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce, queue, url

broker = RabbitBroker(url(), default_channel=Channel(prefetch_count=256, on_return_raises=True), logger=None)
_queue = RabbitQueue(queue(), queue_type=QueueType.QUORUM, durable=True)


async def noop(task: int) -> None:
    note_run(task)


async def enqueue(order: Order) -> None:
    async with broker:
        await broker.declare_queue(_queue)
        await produce(lambda task: broker.publish(task, _queue, persist=True), order)


async def work() -> None:
    broker.subscriber(_queue, ack_policy=AckPolicy.NACK_ON_ERROR)(noop)
    await FastStream(broker, logger=None).run()


if __name__ == "__main__":
    asyncio.run(work() if sys.argv[1] == "work" else enqueue(Order.read()))
