"""Unique tasks that many programs enqueue at once: ``python -m tests.support.unique_app URL COUNT KEYS [SEED]``.

Prints each admitted task's id and key. With a seed the calls are single, and in an order of their own.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path

from leveret import App, Queue, by, current_task

app = App(queues=[Queue("unique")])


@app.task(queue="unique", unique=by("key"))
async def only(key: int, by_whom: int = 0) -> int:  # noqa: ARG001 - no part of the key
    return key


@app.task(queue="unique", unique=by("key", scope="waiting"))
def newest(key: int) -> int:
    """Runs until the test lets it end."""
    ledger = Path(os.environ["LEDGER"])
    with ledger.open("a") as file:
        file.write(f"newest {current_task().id}\n")
    while not ledger.with_name(f"{ledger.name}.{key}").exists():
        time.sleep(0.05)
    return key


@app.task(queue="unique", unique=by("repo", on_conflict="rerun"))
def build(repo: int, commit: str) -> str:
    """Runs until the test lets it end."""
    ledger = Path(os.environ["LEDGER"])
    with ledger.open("a") as file:
        file.write(f"begun {commit}\n")
    while not ledger.with_name(f"{ledger.name}.{repo}").exists():
        time.sleep(0.05)
    with ledger.open("a") as file:
        file.write(f"ended {commit}\n")
    return commit


@app.task(queue="unique", unique=by("doc", debounce=1.0, max_wait=20.0))
async def index(doc: int, number: int) -> tuple[int, float]:  # noqa: ARG001 - the key
    return number, time.time()


async def enqueue(url: str, count: int, keys: int, seed: int | None) -> None:
    app.client.connect_to(url)
    order = [number % keys for number in range(count)]
    if seed is None:
        handles = await only.enqueue_many([(key,) for key in order])
    else:
        random.Random(seed).shuffle(order)
        handles = []
        for start in range(0, count, 50):
            calls = (only.enqueue(key, by_whom=seed) for key in order[start : start + 50])
            for handle in await asyncio.gather(*calls):
                handles.append(handle)
                if not handle.existing:
                    print(handle.id, flush=True)
    await app.close()
    print("done", len(handles), len({handle.id for handle in handles}), flush=True)


if __name__ == "__main__":
    began = time.monotonic()
    asyncio.run(
        enqueue(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
    )
