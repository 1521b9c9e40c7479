"""Programs of chains: no-op steps that follow each other, beside the same tasks enqueued one by one."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.peers.ledger import note_run, own_ledger
from benchmarks.peers.producing import queue, url
from leveret import App, Chain

if TYPE_CHECKING:
    from collections.abc import Iterable

app = App(url(), queues=())


@app.task(queue=queue(), store_result=False)
async def hop(_: int | None, task: int) -> int:
    note_run(task)
    return task


async def enqueue(first: int, chains: int, length: int, outstanding: int) -> None:
    """Enqueue chains of so many steps each, the next task's number in each; of 1: plain tasks."""
    async with app:
        left = iter(range(first, first + chains * length, length))
        await asyncio.gather(*(_send(left, length) for _ in range(outstanding)))


async def _send(firsts: Iterable[int], length: int) -> None:
    for first in firsts:
        own_ledger().note_sent(first)
        if length == 1:
            await hop.enqueue(None, first)
            continue
        chain: Chain[int] = hop.step(None, first)
        for task in range(first + 1, first + length):
            chain |= hop.step(task)
        await chain.enqueue()


if __name__ == "__main__":
    order: dict[str, Any] = json.loads(sys.argv[1])
    asyncio.run(enqueue(**order))
    print(json.dumps({}))
