"""Producers of unique tasks that are killed: ``python -m chaos.unique URL BASE KILLS SEED``; prints how many keys.

Each is forked, so that its moments are those of its work and not of its start.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from contextlib import suppress

from leveret import Queue
from leveret.brokers import connect
from leveret.errors import BrokerError
from leveret.model import UNIQUE_KEY, Envelope, new_id

QUEUE = Queue("chaos-unique")
#: Producers that are alive at once, calls of each at once, and how long one lives (seconds).
_ALIVE, _CALLS, _SHORTEST, _LONGEST = 4, 10, 0.05, 0.5
#: All want the same few keys, and other ones with time, so that each dies while keys are claimed (keys, keys a second).
_WINDOW, _PACE = 40, 200


def keyed(key: int) -> Envelope:
    return Envelope(new_id(), QUEUE.name, "only", b'{"args":[],"kwargs":{}}', headers={UNIQUE_KEY: f"only:{key}"})


async def produce(url: str, base: int, began: float, seed: int) -> None:
    """Enqueue until it is killed."""
    chance, broker = random.Random(seed), connect(url, timeout=20.0)
    await broker.declare([QUEUE])
    while True:
        first = base + int((time.monotonic() - began) * _PACE)
        wanted = [keyed(first + chance.randrange(_WINDOW)) for _ in range(_CALLS)]
        with suppress(BrokerError):
            await asyncio.gather(*(broker.publish([one], on_conflict="ignore") for one in wanted))


def main() -> None:
    url, (base, kills, seed) = sys.argv[1], map(int, sys.argv[2:5])
    chance, alive, began = random.Random(seed), list[int](), time.monotonic()
    for number in range(kills):
        if (pid := os.fork()) == 0:
            try:
                asyncio.run(produce(url, base, began, seed + number))
            finally:
                os._exit(1)
        alive.append(pid)
        if len(alive) == _ALIVE or number == kills - 1:
            time.sleep(chance.uniform(_SHORTEST, _LONGEST))
        while alive and (len(alive) == _ALIVE or number == kills - 1):
            victim = alive.pop(0)
            os.kill(victim, signal.SIGKILL)
            _, status = os.waitpid(victim, 0)
            assert os.WIFSIGNALED(status), "a producer ended by itself"
    print(int((time.monotonic() - began) * _PACE) + _WINDOW)


if __name__ == "__main__":
    main()
