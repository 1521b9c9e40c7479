"""What large tasks cost between a worker and its child: ``python -m benchmarks.crossing``.

A hundred tasks of 1 MiB from one end of a socket pair to the other, both in this process: the processor time of the
two. The goal is half a second.
"""

from __future__ import annotations

import asyncio
import socket
import time

from leveret.executors import Finished, RunRequest
from leveret.executors.wire import Pipe, ToChild, ToWorker, runs
from leveret.model import Envelope, Succeeded

COUNT = 100
SIZE = 1024 * 1024
#: Of processor time (seconds).
GOAL = 0.5
ROUNDS = 5


async def cross(way: str = "jobs") -> float:
    """To the child as jobs, or to the worker as results; the processor time (seconds)."""
    one, other = socket.socketpair()
    worker, child = await Pipe[ToWorker].open(one, ToWorker), await Pipe[ToChild].open(other, ToChild)
    came = asyncio.Event()
    left = COUNT

    def hear(batch: list[ToChild] | list[ToWorker]) -> None:
        nonlocal left
        left -= len(batch)
        if not left:
            came.set()

    worker.hear = child.hear = hear
    jobs = list(runs([RunRequest(key, Envelope(f"{key}", "work", "task", bytes(SIZE))) for key in range(COUNT)]))
    results = [Finished(key, Succeeded(bytes(SIZE))) for key in range(COUNT)]
    begun = time.process_time()
    if way == "jobs":
        worker.write(jobs)
    else:
        child.write(results)
    await came.wait()
    taken = time.process_time() - begun
    worker.close()
    child.close()
    await asyncio.wait([worker.ended, child.ended])
    return taken


def main() -> None:
    for way in ("jobs", "results"):
        times = sorted(asyncio.run(cross(way)) for _ in range(ROUNDS))
        verdict = "reached" if times[0] < GOAL else "missed"
        print(f"{COUNT} {way} of {SIZE:,} bytes: {times[0]:.2f} to {times[-1]:.2f} s; goal {GOAL} s: {verdict}")


if __name__ == "__main__":
    main()
