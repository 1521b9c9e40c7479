"""What a claim costs at a backlog: take and settle through the broker alone, while as many tasks wait as before."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.ours import app, noop
from benchmarks.peers.producing import queue, url
from leveret.brokers import Broker, connect
from leveret.model import Delivery, Queue, Succeeded
from leveret.testing.bench import batches_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

#: Claims that are timed together; before each such window as many tasks are added, so that the backlog stays.
_WINDOW = 500
_CREDIT = 64
#: Tasks in one transaction while the backlog is laid.
_FILL = 10_000


async def _add(count: int) -> None:
    for first in range(0, count, _FILL):
        await noop.enqueue_many((0,) for _ in range(min(_FILL, count - first)))


async def _claim(broker: Broker, batches: AsyncIterator[Sequence[Delivery]], count: int) -> float:
    """Seconds for a claim, the mean of so many."""
    began, done = time.perf_counter(), 0
    while done < count:
        batch = await anext(batches)
        await broker.settle([(delivery, Succeeded()) for delivery in batch])
        done += len(batch)
    return (time.perf_counter() - began) / done


async def main(*, fill: int, windows: int) -> None:
    broker = connect(url())
    async with app:
        await _add(fill)
        async with broker.consume([Queue(queue())], credit=_CREDIT) as consumer:
            batches = batches_of(consumer)
            await _claim(broker, batches, _WINDOW)
            costs = []
            for _ in range(windows):
                await _add(_WINDOW)
                costs.append(await _claim(broker, batches, _WINDOW))
    await broker.close()
    print(json.dumps({"claim": statistics.median(costs)}))


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
