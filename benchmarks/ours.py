"""Leveret's own programs: the application of the benchmarks, and its producers."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from benchmarks.peers.ledger import note_run, own_ledger
from benchmarks.peers.producing import Order, produce, produce_batches, produce_in_turn, queue, url
from leveret import App

if TYPE_CHECKING:
    from collections.abc import Sequence

app = App(url(), queues=())
#: Tasks of one enqueue_many.
BATCH = 1_000


@app.task(queue=queue(), store_result=False)
async def noop(task: int) -> None:
    note_run(task)


async def _many(tasks: Sequence[int]) -> None:
    for task in tasks:
        own_ledger().note_sent(task)
    await noop.enqueue_many((task,) for task in tasks)


def enqueue_in_turn() -> None:
    produce_in_turn(noop.enqueue_sync, Order.read())
    app.close_sync()


async def enqueue(how: str) -> None:
    async with app:
        if how == "many":
            await produce_batches(_many, Order.read(), BATCH)
        else:
            await produce(noop.enqueue, Order.read())


if __name__ == "__main__":
    if sys.argv[2] == "sync":
        enqueue_in_turn()
    else:
        asyncio.run(enqueue(sys.argv[2]))
