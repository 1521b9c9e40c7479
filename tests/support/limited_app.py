"""Tasks with limits that write to a ledger when they begin and end: `$LEDGER`."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from leveret import App, Queue, Rate

app = App(queues=[Queue("limited"), Queue("fair", fair_by="tenant"), Queue("other")])
few = app.limit("few", concurrency=5)
steady = app.limit("steady", rate=Rate(20, per=1.0, burst=1))


def note(line: str) -> None:
    """One write, so that lines of several processes are whole and in their order."""
    with Path(os.environ["LEDGER"]).open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


@app.task(queue="limited", limits=[few])
async def step(number: int, seconds: float = 0.01) -> None:
    note(f"began {number} {os.getpid()} {time.monotonic():.4f}")
    await asyncio.sleep(seconds)
    note(f"ended {number} {os.getpid()} {time.monotonic():.4f}")


@app.task(queue="other")
async def free(number: int) -> int:
    """No task of its queue has limits, as far as the code says."""
    return number


@app.task(queue="limited", limits=[steady])
async def tick(number: int) -> None:
    note(f"tick {number} {time.time():.4f}")


@app.task(queue="fair")
async def serve(tenant: str, number: int) -> None:
    note(f"serve {tenant} {number} {time.time():.4f}")
