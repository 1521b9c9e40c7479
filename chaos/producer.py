"""A producer process: enqueues until SIGTERM, and notes each task that is safe, or may be, in the file $SENT."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from chaos.app import app, grind, work
from leveret.errors import EnqueueTimeout, LeveretError

#: Calls of `enqueue` at once.
_CALLS = 4
#: Seconds between two calls of one of its loops, on average.
_PAUSE = 0.12
#: The longest task (seconds). Most are much shorter.
_LONGEST = 0.5


def note(word: str, id_: str) -> None:
    descriptor = os.open(Path(os.environ["SENT"]), os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, f"{word} {id_} {time.time():.4f} {os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


async def produce(chance: random.Random, stop: asyncio.Event) -> None:
    while not stop.is_set():
        task = chance.choice((work, grind))
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
        await asyncio.sleep(chance.uniform(0, 2 * _PAUSE))


async def main(url: str, seed: int) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app.connect_to(url)
    await asyncio.gather(*(produce(random.Random(seed + number), stop) for number in range(_CALLS)))
    await app.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
