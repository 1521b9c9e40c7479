"""taskiq on taskiq-aio-pika: a quorum queue, acknowledged after the run, no results."""

from __future__ import annotations

import asyncio

from taskiq_aio_pika import AioPikaBroker, Queue, QueueType

from benchmarks.peers.ledger import note_run
from benchmarks.peers.producing import Order, produce, queue, url

broker = AioPikaBroker(
    url(),
    qos=256,
    task_queues=[Queue(name=queue(), type=QueueType.QUORUM)],
    dead_letter_queue=Queue(name=f"{queue()}.dead", type=QueueType.QUORUM),
)


@broker.task("noop")
async def noop(task: int) -> None:
    note_run(task)


async def enqueue(order: Order) -> None:
    await broker.startup()
    await produce(noop.kiq, order)
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(enqueue(Order.read()))
