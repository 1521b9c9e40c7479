"""Other people's tasks: so many a second, with their results. ``python -m chaos.traffic URL RATE``, until SIGTERM.

It prints one line: how many were stored, how many may be, and of how many the result was looked for and not found.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

from leveret import App, Queue
from leveret.errors import LeveretError

if TYPE_CHECKING:
    from leveret.client.handle import Handle

QUEUE = "chaos-traffic"
#: So many are enqueued at once, in this time (seconds).
_TURN = 0.1
#: Of so many the result is looked for at the end, within this time (seconds).
_SAMPLE = 200
_PATIENCE = 120.0

app = App(queues=[Queue(QUEUE)])


@app.task(queue=QUEUE)
async def pass_by(number: int) -> int:
    return number


async def main(url: str, rate: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app.client.connect_to(url)
    handles: list[Handle[int]] = []
    unknown, count = 0, int(rate * _TURN)
    while not stop.is_set():
        began = time.monotonic()
        try:
            handles += await pass_by.enqueue_many([(number,) for number in range(count)])
        except LeveretError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            unknown += count
        await asyncio.sleep(max(0.0, began + _TURN - time.monotonic()))
    sample = random.sample(handles, min(_SAMPLE, len(handles)))
    found = await asyncio.gather(*(is_there(handle) for handle in sample))
    print(f"traffic: {len(handles)} stored, {unknown} unknown, {found.count(False)} results missing", flush=True)
    await app.close()


async def is_there(handle: Handle[int]) -> bool:
    try:
        await handle.result(timeout=_PATIENCE)
    except LeveretError as error:
        print(f"a result: {type(error).__name__}: {error}", flush=True)
        return False
    return True


if __name__ == "__main__":
    # By its name, as the worker knows its tasks.
    from chaos import traffic

    asyncio.run(traffic.main(sys.argv[1], int(sys.argv[2])))
