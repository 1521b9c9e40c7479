"""The application of the faults that are about schedules: a task each second, whatever becomes of the one before."""

from __future__ import annotations

from chaos.app import ENQUEUE_TIMEOUT, QUEUE, note
from leveret import App, Queue, every

app = App(queues=[Queue(QUEUE)], enqueue_timeout=ENQUEUE_TIMEOUT)


@app.task(queue=QUEUE, store_result=False, schedule=every(seconds=1, overlap="allow"))
async def tick() -> None:
    note("start")
    note("end")
