"""The application of the faults that are about schedules: a task each second, whatever becomes of the one before.

An instant that nobody kept, on a machine that is too busy for it, comes late and is not left out: a loss is a loss.
"""

from __future__ import annotations

from chaos.app import ENQUEUE_TIMEOUT, QUEUE, note
from leveret import App, Queue, every

app = App(queues=[Queue(QUEUE)], enqueue_timeout=ENQUEUE_TIMEOUT)


@app.task(queue=QUEUE, store_result=False, schedule=every(seconds=1, overlap="allow", catch_up="all"))
async def tick() -> None:
    note("start")
    note("end")
