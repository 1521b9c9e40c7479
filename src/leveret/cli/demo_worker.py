"""A worker of ``leveret demo``, ``python -m leveret.cli.demo_worker``: the tutorial's task, a pause a dot."""

from __future__ import annotations

import asyncio

from leveret.client import App
from leveret.model import Queue
from leveret.observe import Event, WorkerReady
from leveret.worker import run_worker

QUEUE = "leveret-demo"
#: The tutorial's second of work a dot, shortened (seconds).
SECONDS_A_DOT = 0.5

app = App(queues=[Queue(QUEUE)])


@app.task(queue=QUEUE, default=True)
async def work(body: bytes) -> None:
    print(f" [x] Received {body.decode()!r}")
    await asyncio.sleep(body.count(b".") * SECONDS_A_DOT)
    print(f" [x] Done {body.decode()!r}")


def announce(event: Event) -> None:
    if isinstance(event, WorkerReady):
        print(" [*] Waiting for messages. To exit press CTRL+C", flush=True)


if __name__ == "__main__":
    run_worker(f"{__spec__.name}:app", concurrency=1, listeners=[announce], log_level="WARNING")
