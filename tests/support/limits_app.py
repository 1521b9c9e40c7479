"""An application with limits. Each run notes its start and its end, so that what was under way at once can be told."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from leveret import App, Limited, Queue, Rate, current_task

app = App(queues=[Queue("render", concurrency=2, fair_by="tenant")])
few = app.limit("few", concurrency=int(os.environ.get("FEW", "3")))
tenants = app.limit("tenants", concurrency=1, by="tenant")
#: Who was told to come again; of one child process.
told: set[str] = set()
rated = app.limit("rated", rate=Rate(20, per=1, burst=1))


def note(text: str) -> None:
    with Path(os.environ["LEDGER"]).open("a") as ledger:
        ledger.write(f"{text} {time.time():.4f}\n")


async def _run(text: str, seconds: float) -> None:
    note(f"start {text}")
    await asyncio.sleep(seconds)
    note(f"end {text}")


@app.task(queue="work", limits=few)
async def under_few(number: int, seconds: float = 0.02) -> None:
    await _run(f"few {number}", seconds)


@app.task(queue="work", limits=[few, tenants])
async def under_both(tenant: str, number: int, seconds: float = 0.02) -> None:
    await _run(f"both {tenant} {number}", seconds)


@app.task(queue="work", limits=rated)
async def at_a_rate(number: int) -> None:
    note(f"rated {number}")


@app.task(queue="work")
async def free(number: int) -> None:
    note(f"free {number}")


@app.task(queue="render")
async def render(tenant: str, number: int) -> None:
    await _run(f"render {tenant} {number}", 0.05)


@app.task(queue="work", limits=tenants, max_attempts=1)
async def refused_once(tenant: str, number: int) -> None:
    """The first run of each tenant is told to come again."""
    note(f"call {tenant} {number} {current_task().attempt}")
    if tenant not in told:
        told.add(tenant)
        raise Limited(tenants, for_=1.5)
    note(f"done {tenant} {number}")
