"""Programs of tasks whose results are kept: one that waits for its own, and one that keeps the broker busy."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.peers.producing import queue, url
from leveret import App

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

app = App(url(), queues=())
#: Between two of the batches that others enqueue (seconds).
_PAUSE = 0.05
#: Connections are opened, and the stream is read, by the first ones.
_WARM_UP = 5
_MS = 1e3


@app.task(queue=queue())
async def echo(number: int) -> int:
    return number


async def others(rate: float) -> None:
    """Enqueue so many a second until this program is stopped, and wait for none."""
    sent, began = 0, time.monotonic()
    while True:
        due = int((time.monotonic() - began) * rate)
        await echo.enqueue_many((number,) for number in range(sent, due))
        sent = due
        await asyncio.sleep(_PAUSE)


async def wait_and_look(count: int, age: float) -> dict[str, float]:
    """What a result costs the program that enqueued its task, and a status another one, so many seconds later."""
    ids: list[str] = []

    async def enqueue_and_wait() -> None:
        handle = await echo.enqueue(len(ids))
        assert await handle.result() == len(ids)
        ids.append(handle.id)

    waits = await _measure(enqueue_and_wait, count + _WARM_UP)
    await asyncio.sleep(age)
    asked = iter(ids)
    async with App(app.url) as another:

        async def look() -> None:
            status = await another.handle(next(asked)).status()
            assert status.state == "succeeded"

        looks = await _measure(look, count + _WARM_UP)
    await app.close()
    return {
        "result": statistics.median(wall for wall, _ in waits) * _MS,
        "result p99": sorted(wall for wall, _ in waits)[int(len(waits) * 0.99)] * _MS,
        "result cpu": statistics.mean(used for _, used in waits) * _MS,
        "status": statistics.median(wall for wall, _ in looks) * _MS,
        "status cpu": statistics.mean(used for _, used in looks) * _MS,
    }


async def _measure(act: Callable[[], Awaitable[None]], count: int) -> list[tuple[float, float]]:
    """How long each took, and the processor time of this program (seconds), without the first ones."""
    took = []
    for _ in range(count):
        began, used = time.perf_counter(), time.process_time()
        await act()
        took.append((time.perf_counter() - began, time.process_time() - used))
    return took[_WARM_UP:]


def main() -> None:
    order = json.loads(sys.argv[1])
    if sys.argv[2] == "others":
        asyncio.run(others(order["rate"]))
    else:
        print(json.dumps(asyncio.run(wait_and_look(order["count"], order["age"]))), flush=True)


if __name__ == "__main__":
    main()
