"""The application of the faults that are about limits."""

from __future__ import annotations

import asyncio

from chaos.app import ENQUEUE_TIMEOUT, QUEUE, note
from leveret import App, Queue

#: How many may be under way at once.
MOST = 5
#: How long each runs (seconds).
_TAKES = 0.01

app = App(queues=[Queue(QUEUE)], enqueue_timeout=ENQUEUE_TIMEOUT)
five = app.limit("chaos-five", concurrency=MOST)


@app.task(queue=QUEUE, store_result=False, limits=five)
async def step() -> None:
    note("start")
    await asyncio.sleep(_TAKES)
    note("end")
