"""The measurements. Each checks in its run that every task ran exactly once, and gives plain numbers."""

from __future__ import annotations

import secrets
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.ledger import Ledger
from benchmarks.programs import Programs, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.entrants import Entrant
    from benchmarks.places import Place

#: How long a measurement may make no progress (seconds).
_PATIENCE = 60.0
#: How often the harness looks at the ledger: seldom, it shares the cores with what it measures (seconds).
_LOOK = 0.05
#: The part of the tasks at the beginning that is not counted: imports, connections, the first growth of everything.
_WARM_UP = 0.1


class Incorrect(Exception):
    """A task did not run, or ran more than once."""


class Setting:
    """One entrant on a queue of its own, and the ledger of its tasks."""

    def __init__(self, entrant: Entrant, place: Place, queue: str, ledger: Ledger, programs: Programs) -> None:
        self.entrant = entrant
        self.place = place
        self.queue = queue
        self.ledger = ledger
        self.programs = programs

    def wait_for_all(self, workers: Sequence[Worker], tasks: int) -> None:
        """Until the first so many tasks have run. Raises Incorrect when nothing happens any more."""
        done, since = -1, time.monotonic()
        while (now := sum(map(bool, self.ledger.runs[:tasks]))) < tasks:
            for worker in workers:
                worker.check()
            if now != done:
                done, since = now, time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                said = workers[0].output[-2000:]
                raise Incorrect(f"{self.entrant.name}: {tasks - now} of {tasks} tasks did not run; it said:\n{said}")
            time.sleep(_LOOK)

    def check(self, tasks: int) -> None:
        """Every one of the tasks ran once, and is gone. Call it when the workers have stopped."""
        runs = self.ledger.runs
        wrong = [task for task in range(tasks) if runs[task] != 1]
        if wrong:
            raise Incorrect(f"{self.entrant.name}: {len(wrong)} of {tasks} tasks ran more or less than once: {wrong[:9]}")
        left = self.place.remaining(self.queue)
        if left:
            raise Incorrect(f"{self.entrant.name}: {left} of {tasks} tasks were run and are still in the queue")


@contextmanager
def setting(entrant: Entrant, place: Place, tasks: int) -> Iterator[Setting]:
    queue = f"bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="leveret-ledger-", dir="/dev/shm") as folder:
        path = Path(folder) / "ledger"
        ledger = Ledger.create(path, tasks)
        try:
            yield Setting(entrant, place, queue, ledger, Programs(entrant, place.url(queue), queue, path))
        finally:
            place.forget(queue)


def throughput(entrant: Entrant, place: Place, tasks: int) -> dict[str, float]:
    """Enqueue no-op tasks, then run them: tasks a second of both."""
    with setting(entrant, place, tasks) as here:
        enqueue = tasks / here.programs.produce(0, tasks)
        with here.programs.working() as workers:
            here.wait_for_all(workers, tasks)
        here.check(tasks)
        return {"enqueue": enqueue, "run": _rate(here.ledger, entrant.workers * entrant.children)}


def _rate(ledger: Ledger, processes: int) -> float:
    """Tasks a second, from when all processes were at work and warm to the start of the last task."""
    first: dict[int, int] = {}
    runs = sorted(zip(ledger.started, ledger.pids, strict=True))
    for started, pid in runs:
        first.setdefault(pid, started)
    if len(first) != processes:
        raise Incorrect(f"{processes} processes were to run tasks, {len(first)} did: more tasks are needed")
    starts = [started for started, _ in runs]
    begin = max(*first.values(), starts[int(len(starts) * _WARM_UP)])
    counted = sum(started > begin for started in starts)
    return counted / (starts[-1] - begin) * 1e9
