"""The measurements of limits: what they cost, how even a rate is, who waits behind whom, and many keys."""

from __future__ import annotations

import os
import re
import signal
import statistics
import time
from bisect import bisect_left
from typing import TYPE_CHECKING

from benchmarks import entrants as e
from benchmarks import processes
from benchmarks.entrants import EACH, KEYS, RATE, TENANTS
from benchmarks.measures import Incorrect, setting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.entrants import Entrant
    from benchmarks.measures import Setting
    from benchmarks.places import Place
    from benchmarks.programs import Worker

#: How long starts are counted (seconds), and how many tasks there are then.
_RATED, _RATED_TASKS = 60.0, 7_000
#: Tasks with keys, and how many of them run before memory is read.
_KEYED, _KEYED_BEFORE = 3 * KEYS, 3_000
_LOOK = 0.005
#: How long something that is looked for may take (seconds).
_PATIENCE = 120.0
#: A program that asks for something may hold the table for a moment; who has the highest epoch holds it now.
_HOLDS = re.compile(r"holds the table 'limits': epoch (\d+)")
#: Tasks that are run and not counted.
_PROBES = 200
#: Tasks that compute are slow: the part of the others.
_COMPUTING = 0.3
#: How long a program that admits takes to begin (seconds).
_BEGINS = 1.0


def unreached(place: Place, *, tasks: int, rounds: int) -> dict[str, float]:
    """Processor time of a task from its enqueue to its end with a limit, to the same without: no-ops, and 1 ms."""
    found: dict[str, list[float]] = {"no-op": [], "1 ms": []}
    pairs = (
        ("no-op", e.LIMITED, e.UNLIMITED, tasks),
        ("1 ms", e.COMPUTING_LIMITED, e.COMPUTING, int(tasks * _COMPUTING)),
    )
    for number in range(rounds):
        for name, limited, without, count in pairs:
            turn = (limited, without) if number % 2 else (without, limited)
            took = {one: _processor_time(one, place, count) for one in turn}
            found[name].append(took[limited] / took[without])
    return {name: statistics.median(values) for name, values in found.items()}


def _processor_time(entrant: Entrant, place: Place, tasks: int) -> float:
    """Of the producer, and of a worker and its child that are warm: seconds a task."""
    with setting(entrant, place, _PROBES + tasks) as here, here.programs.working() as workers:
        here.programs.produce(0, _PROBES)
        here.wait_for_all(workers, _PROBES)
        family = processes.family(workers[0].pid)
        before = processes.cpu_seconds(family)
        produced = here.programs.produce(_PROBES, tasks)
        here.wait_for_all(workers, _PROBES + tasks)
        return (produced["cpu"] + processes.cpu_seconds(family) - before) / tasks


def rated(place: Place) -> dict[str, float]:
    """A rate of 100 a second: by how many tasks a minute's starts are off, and the most starts within a second."""
    with setting(e.RATED, place, _RATED_TASKS) as here:
        here.programs.produce(0, _RATED_TASKS)
        with here.programs.working() as workers:
            _wait(lambda: any(here.ledger.runs), workers, "the first task has run")
            time.sleep(_RATED + 1.0)
        starts = sorted(filter(None, here.ledger.started))
    counted = starts[: bisect_left(starts, starts[0] + _RATED * 1e9)]
    most = max(bisect_left(starts, start + 1e9) - place for place, start in enumerate(starts))
    return {"off": abs(len(counted) - RATE * _RATED), "most": most}


def tenants(place: Place, many: int) -> dict[str, float]:
    """How long small tenants' tasks take behind those of one, to what they take alone: in tasks, so by no clock."""
    small, count = TENANTS * EACH, many + TENANTS * EACH
    with setting(e.FAIR, place, count) as here:
        here.programs.produce(0, count)
        with here.programs.working() as workers:
            _wait(lambda: all(here.ledger.runs[many:]), workers, "the small tenants' tasks have run")
        started = here.ledger.started
    last = max(started[many:])
    return {"fair": sum(0 < one <= last for one in started) / small}


def through(place: Place, *, tasks: int, rounds: int) -> dict[str, float]:
    """Tasks a second through a gate whose limit is not reached; processor time of both its ends for each (us)."""
    found: list[dict[str, float]] = []
    for _ in range(rounds):
        with setting(e.LIMITED, place, 1) as here, here.programs.beside(("benchmarks.limited", "admit"), {}) as holder:
            time.sleep(_BEGINS)
            before = processes.cpu_seconds([holder.pid])
            took = here.programs.ask(("benchmarks.limited", "through"), {"count": tasks})
            took["holder"] = (processes.cpu_seconds([holder.pid]) - before) * 1e6 / tasks
            found.append(took)
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def many_keys(place: Place) -> dict[str, float]:
    """With 10,000 keys: how long until another program admits, when the one that does is killed (seconds), and the MB
    that this takes more of it.
    """
    with setting(e.KEYED, place, _KEYED) as here, here.programs.working() as workers:
        here.programs.produce(0, _KEYED)
        _wait_for_runs(here, workers, _KEYED_BEFORE)
        holder, other = sorted(workers, key=_epoch, reverse=True)
        epoch, pids = _epoch(holder), processes.family(other.pid)
        before = processes.resident(pids)
        os.killpg(holder.pid, signal.SIGKILL)
        began = time.monotonic()
        _wait(lambda: _epoch(other) > epoch, [other], "the other one admits tasks")
        took = time.monotonic() - began
        _wait_for_runs(here, [other], 2 * _KEYED_BEFORE)
        size = processes.resident(pids)
        workers.remove(holder)
        holder.stop()
    return {"takeover": took, "MB more": (size - before) / 1e6}


def _wait_for_runs(here: Setting, workers: Sequence[Worker], tasks: int) -> None:
    _wait(lambda: here.ran(_KEYED) >= tasks, workers, f"{tasks} tasks have run")


def _epoch(worker: Worker) -> int:
    """The last one in which it held the table."""
    return max(map(int, _HOLDS.findall(worker.output)), default=0)


def _wait(condition: Callable[[], bool], workers: Sequence[Worker], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        for worker in workers:
            worker.check()
        if time.monotonic() > deadline:
            raise Incorrect(f"it was waited in vain until {what}; a worker said:\n{workers[0].output[-2000:]}")
        time.sleep(_LOOK)
