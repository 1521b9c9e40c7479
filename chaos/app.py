"""The application under fault. Each run of a task notes its beginning and its end in the file $LEDGER."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from leveret import App, Queue, current_task

QUEUE = "chaos"
#: Short, so that an outage shows in the producers' books while it lasts (seconds).
ENQUEUE_TIMEOUT = 10.0

app = App(queues=[Queue(QUEUE)], enqueue_timeout=ENQUEUE_TIMEOUT)


def note(word: str) -> None:
    """One line in one write, so that the lines of several processes do not mix."""
    line = f"{word} {current_task().id} {time.time():.4f} {os.getpid()}\n"
    descriptor = os.open(Path(os.environ["LEDGER"]), os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@app.task(queue=QUEUE)
async def work(seconds: float) -> None:
    note("start")
    await asyncio.sleep(seconds)
    note("end")


@app.task(queue=QUEUE)
def grind(seconds: float) -> None:
    """The same in a thread."""
    note("start")
    time.sleep(seconds)
    note("end")


@app.task(queue=QUEUE, max_attempts=5, backoff=0.5)
async def flaky(seconds: float) -> float:
    """Fails at first, and returns something at last."""
    if current_task().attempt == 1:
        raise ValueError("not yet")
    note("start")
    await asyncio.sleep(seconds)
    note("end")
    return seconds


@app.task(queue=QUEUE, max_attempts=2, backoff=0)
async def segfault() -> None:
    note("start")
    os.kill(os.getpid(), signal.SIGSEGV)


@app.task(queue=QUEUE, max_attempts=2, backoff=0)
async def leave() -> None:
    note("start")
    os._exit(7)


@app.task(queue=QUEUE, max_attempts=2, backoff=0)
async def out_of_memory() -> None:
    """What the kernel does to a process that takes too much."""
    note("start")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(queue=QUEUE, max_attempts=2, backoff=0)
async def fail() -> None:
    note("start")
    raise ValueError("always")
