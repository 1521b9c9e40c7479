"""A producer process: enqueues until SIGTERM, and notes each task that is safe, or may be, in the file $SENT.

With $MIXED some tasks are delayed, some fail at first, and the results of some are waited for.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos.app import app, flaky, grind, work
from leveret.errors import EnqueueTimeout, LeveretError, TaskFailed

if TYPE_CHECKING:
    from leveret.client.handle import Handle
    from leveret.client.task import Task

#: Calls of `enqueue` at once.
_CALLS = 4
#: Seconds between two calls of one of its loops, on average.
_PAUSE = 0.12
#: The longest task (seconds). Most are much shorter.
_LONGEST = 0.5
#: With $MIXED: the longest delay (seconds), how many are delayed, how many results are waited for, how many at once.
_DELAY = 5.0
_DELAYED = 0.2
_AWAITED = 0.2
_AT_ONCE = 40
#: How long the last results may take when it is told to stop (seconds).
RESULTS = 120.0


def note(word: str, id_: str) -> None:
    descriptor = os.open(Path(os.environ["SENT"]), os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, f"{word} {id_} {time.time():.4f} {os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


async def produce(chance: random.Random, stop: asyncio.Event, waiting: set[asyncio.Task[None]]) -> None:
    is_mixed = bool(os.environ.get("MIXED"))
    while not stop.is_set():
        task: Task[[float], Any] = chance.choice((work, grind, flaky) if is_mixed else (work, grind))
        if is_mixed and chance.random() < _DELAYED:
            task = task.options(delay=chance.uniform(0.2, _DELAY))
        try:
            handle = await task.enqueue(_LONGEST * chance.random() ** 4)
        except EnqueueTimeout as error:
            for id_ in error.ids:
                note("unknown", id_)
        except LeveretError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            note("refused", "-")
        else:
            note("safe", handle.id)
            if is_mixed and chance.random() < _AWAITED and len(waiting) < _AT_ONCE:
                answer = asyncio.create_task(wait_for(handle))
                waiting.add(answer)
                answer.add_done_callback(waiting.discard)
        await asyncio.sleep(chance.uniform(0, 2 * _PAUSE))


async def wait_for(handle: Handle[Any]) -> None:
    """As a program does that waits for as long as it takes: an error of the broker's is no answer."""
    note("awaited", handle.id)
    while True:
        try:
            with suppress(TaskFailed):
                await handle.result()
        except LeveretError as error:
            print(f"a result: {type(error).__name__}: {error}", flush=True)
            await asyncio.sleep(1)
        else:
            note("answered", handle.id)
            return


async def main(url: str, seed: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app.client.connect_to(url)
    waiting: set[asyncio.Task[None]] = set()
    await asyncio.gather(*(produce(random.Random(seed + number), stop, waiting) for number in range(_CALLS)))
    if waiting:
        await asyncio.wait(waiting, timeout=RESULTS)
    for answer in waiting:
        answer.cancel()
    await app.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
