"""The measurements. Each checks in its run that every task ran exactly once, and gives plain numbers."""

from __future__ import annotations

import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import processes
from benchmarks.entrants import OURS, OURS_CHAINED, OURS_KEPT, OURS_SCHEDULED, OURS_UNSCHEDULED, WIRE
from benchmarks.peers.ledger import Ledger
from benchmarks.places import RabbitMQ
from benchmarks.programs import Programs, Worker, environment

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.entrants import Entrant
    from benchmarks.places import Place

#: Where a ledger is never written to a disk.
_SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
#: How long a measurement may make no progress (seconds).
_PATIENCE = 60.0
#: How often the harness looks at the ledger: seldom, it shares the cores with what it measures (seconds).
_LOOK = 0.05
#: The part of the tasks at the beginning that is not counted: imports, connections, the first growth of everything.
_WARM_UP = 0.1
#: Tasks that are run and not counted, before a latency or a footprint is measured.
_PROBES = 50
#: A throughput whose tasks were too few is measured on twice as many, up to so many.
_MOST_TASKS = 1_000_000
#: Calls of unique tasks at once; how often a program begins beside many of them.
_CALLS = 200
_BEGINNINGS = 3
#: How long a worker that nothing is enqueued for may take to start, and to have declared what it has (seconds).
_STARTED = 8.0
#: How long processes are left alone before their memory is read (seconds).
_REST = 2.0


class Incorrect(Exception):
    """A task did not run, or ran more than once."""


class TooFew(Exception):
    """All the tasks had run before the last process was at work."""


class Setting:
    """One entrant on a queue of its own, and the ledger of its tasks."""

    def __init__(self, entrant: Entrant, place: Place, path: Path, tasks: int) -> None:
        self.entrant = entrant
        self.place = place
        self.path = path
        self.queue = f"bench-{secrets.token_hex(4)}"
        self.ledger = Ledger.create(path, tasks)
        self.programs = Programs(entrant, place.url(self.queue), self.queue, path)

    def ran(self, tasks: int) -> int:
        """How many of the first so many have run."""
        return sum(map(bool, self.ledger.runs[:tasks]))

    def wait_for_all(self, workers: Sequence[Worker], tasks: int) -> None:
        """Until the first so many tasks have run. Raises Incorrect when nothing happens any more."""
        missing, since = 0, time.monotonic()
        # They run about in order, so that each look is short however many they are.
        while (now := self.ledger.first_missing(missing, tasks)) < tasks:
            for worker in workers:
                worker.check()
            if now != missing:
                missing, since = now, time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                left, said = tasks - self.ran(tasks), workers[0].output[-2000:]
                raise Incorrect(f"{self.entrant.name}: {left} of {tasks} tasks did not run; it said:\n{said}")
            time.sleep(_LOOK)

    def check(self, tasks: int) -> None:
        """Every one of the tasks ran once, and is gone. Call it when the workers have stopped."""
        runs = self.ledger.runs
        wrong = [task for task in range(tasks) if runs[task] != 1]
        if wrong:
            raise Incorrect(
                f"{self.entrant.name}: {len(wrong)} of {tasks} tasks ran more or less than once: {wrong[:9]}"
            )
        left = self.place.remaining(self.queue)
        if left:
            raise Incorrect(f"{self.entrant.name}: {left} of {tasks} tasks were run and are still in the queue")


@contextmanager
def setting(entrant: Entrant, place: Place, tasks: int) -> Iterator[Setting]:
    with tempfile.TemporaryDirectory(prefix="leveret-bench-", dir=_SHARED_MEMORY) as folder:
        here = Setting(entrant, place, Path(folder) / "ledger", tasks)
        try:
            yield here
        finally:
            place.forget(here.queue)


def throughput(entrant: Entrant, place: Place, tasks: int) -> dict[str, float]:
    """Enqueue no-op tasks, then run them: tasks a second of both, and microseconds of processor time that each takes.

    The processor time (the producer's; the workers' and all their children's) tells on a busy machine too where work
    became less.
    """
    try:
        return _throughput(entrant, place, tasks)
    except TooFew:
        if tasks > _MOST_TASKS:
            raise
        return throughput(entrant, place, 2 * tasks)


def _throughput(entrant: Entrant, place: Place, tasks: int) -> dict[str, float]:
    with setting(entrant, place, tasks) as here:
        took = here.programs.produce(0, tasks)
        with here.programs.working() as workers:
            here.wait_for_all(workers, int(tasks * _WARM_UP))
            begun, before = here.ran(tasks), _cpu_seconds(workers)
            here.wait_for_all(workers, tasks)
            used = _cpu_seconds(workers) - before
        here.check(tasks)
        run = rate(here.ledger, entrant.workers * entrant.children)
        return {
            "enqueue": tasks / took["seconds"],
            "enqueue cpu": took["cpu"] * 1e6 / tasks,
            "run": run,
            "run cpu": used * 1e6 / max(1, tasks - begun),
        }


def rate(ledger: Ledger, processes: int) -> float:
    """Tasks a second, from when all processes were at work and warm to the start of the last task."""
    first: dict[int, int] = {}
    runs = sorted(zip(ledger.started, ledger.pids, strict=True))
    for started, pid in runs:
        first.setdefault(pid, started)
    if len(first) != processes:
        raise TooFew(f"{processes} processes were to run tasks, {len(first)} did")
    starts = [started for started, _ in runs]
    begin = max(*first.values(), starts[int(len(starts) * _WARM_UP)])
    counted = sum(started > begin for started in starts)
    return counted / (starts[-1] - begin) * 1e9


def latency(entrant: Entrant, place: Place, *, rate: float, seconds: float, outstanding: int) -> dict[str, float]:
    """From the call that enqueues to the start of the run, at a steady rate: milliseconds."""
    tasks = _PROBES + int(rate * seconds)
    with setting(entrant, place, tasks) as here:
        with here.programs.working() as workers:
            _probe(here, workers)
            here.programs.produce(_PROBES, tasks - _PROBES, rate=rate, outstanding=outstanding)
            here.wait_for_all(workers, tasks)
        here.check(tasks)
        pairs = list(zip(here.ledger.sent, here.ledger.started, strict=True))[_PROBES:]
    waits = sorted((started - sent) / 1e6 for sent, started in pairs)
    return {"median": statistics.median(waits), "p99": waits[int(len(waits) * 0.99)]}


def beside_others(place: Place, *, rate: float, asks: int, age: float) -> dict[str, float]:
    """What a result and a status cost while others do so many tasks a second, and how many times as much as without.

    Milliseconds of time and of the asking program's processor time. ``age``: how long ago the tasks ended that another
    program asks for (seconds).
    """
    with setting(OURS_KEPT, place, 1) as here:
        programs, order = here.programs, {"count": asks, "age": age}
        with programs.working():
            quiet = programs.ask(OURS_KEPT.producer, order)
            with programs.beside(("benchmarks.kept", "others"), {"rate": rate}):
                time.sleep(age)
                busy = programs.ask(OURS_KEPT.producer, order)
    ratios = {f"{name}, busy to quiet": busy[name] / quiet[name] for name in ("result", "result p99", "result cpu")}
    return {**busy, **ratios}


def unique_rates(place: Place, *, tasks: int, rounds: int) -> dict[str, float]:
    """Tasks a second with a unique key each, and to the same without, of calls at once and of enqueue_many."""
    with setting(OURS, place, 1) as here:
        order = {"tasks": tasks, "outstanding": _CALLS, "rounds": rounds}
        return here.programs.ask(("benchmarks.unique", "rates"), order)


def first_unique(place: Place, live: int, ended: int) -> dict[str, float]:
    """What a program's first unique task takes, with so many there and others that have ended: seconds, and MB."""
    with setting(OURS, place, 1) as here:
        here.programs.ask(("benchmarks.unique", "fill"), {"live": live, "ended": ended})
        found = [here.programs.ask(("benchmarks.unique", "begin"), {}) for _ in range(_BEGINNINGS)]
        return {name: statistics.median(numbers[name] for numbers in found) for name in found[0]}


def chain_rates(place: Place, *, chains: int, length: int, rounds: int) -> dict[str, float]:
    """Steps a second of chains that are enqueued while a worker runs, microseconds of the worker's processor time that
    each takes, and both to those of the same tasks enqueued one by one.
    """
    tasks = chains * length
    found: dict[str, list[float]] = {}
    with setting(OURS_CHAINED, place, _PROBES + 2 * tasks * rounds) as here, here.programs.working() as workers:
        here.programs.ask(("benchmarks.chained",), _chains(0, _PROBES, 1))
        here.wait_for_all(workers, _PROBES)
        first = _PROBES
        for turn in range(rounds):
            took: dict[int, tuple[float, float]] = {}
            for each in (length, 1) if turn % 2 else (1, length):
                before = _cpu_seconds(workers)
                here.programs.ask(("benchmarks.chained",), _chains(first, tasks // each, each))
                here.wait_for_all(workers, first + tasks)
                used = _cpu_seconds(workers) - before
                sent = [moment for moment in here.ledger.sent[first : first + tasks] if moment]
                seconds = (max(here.ledger.started[first : first + tasks]) - min(sent)) / 1e9
                took[each] = tasks / seconds, used * 1e6 / tasks
                first += tasks
            numbers = {
                "steps": took[length][0],
                "step cpu": took[length][1],
                "plain": took[1][0],
                "plain cpu": took[1][1],
                "step to plain": took[1][0] / took[length][0],
                "step cpu to plain cpu": took[length][1] / took[1][1],
            }
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def _chains(first: int, chains: int, length: int) -> dict[str, int]:
    return {"first": first, "chains": chains, "length": length, "outstanding": _CALLS}


def schedules_idle(place: Place, *, idle: float, rounds: int) -> dict[str, float]:
    """What a hundred schedules of which none falls due take of an idle worker: per cent of a core, and MB."""
    # A worker without schedules stands by where there are some: these are measured first.
    without, with_ = (
        [_idle_worker(entrant, place, idle) for _ in range(rounds)] for entrant in (OURS_UNSCHEDULED, OURS_SCHEDULED)
    )
    medians = [[statistics.median(values) for values in zip(*found, strict=True)] for found in (without, with_)]
    used, size = (after - before for before, after in zip(*medians, strict=True))
    return {"idle": medians[1][0], "idle more": used, "MB more": size}


def _idle_worker(entrant: Entrant, place: Place, idle: float) -> tuple[float, float]:
    """Per cent of a core, and MB."""
    with setting(entrant, place, 1) as here, here.programs.working() as workers:
        time.sleep(_STARTED)
        workers[0].check()
        family = processes.family(workers[0].pid)
        before, began = processes.cpu_seconds(family), time.monotonic()
        time.sleep(idle)
        used = (processes.cpu_seconds(family) - before) / (time.monotonic() - began)
        return used * 100, processes.resident(family) / 1e6


def footprint(entrant: Entrant, place: Place, *, tasks: int, idle: float) -> dict[str, float]:
    """A worker and its child: MB at rest, MB more after so many tasks, and per cent of a core while idle."""
    with setting(entrant, place, _PROBES + 2 * tasks) as here:
        with here.programs.working() as workers:
            _probe(here, workers)
            family = processes.family(workers[0].pid)
            time.sleep(_REST)
            before, began = processes.cpu_seconds(family), time.monotonic()
            time.sleep(idle)
            used = (processes.cpu_seconds(family) - before) / (time.monotonic() - began)
            rest = processes.resident(family)
            # The first ones fill what is filled once: caches, pools, the allocator's arenas.
            sizes = []
            for first in (_PROBES, _PROBES + tasks):
                here.programs.produce(first, tasks)
                here.wait_for_all(workers, first + tasks)
                time.sleep(_REST)
                sizes.append(processes.resident(family))
        here.check(_PROBES + 2 * tasks)
        return {"at rest": rest / 1e6, "growth": (sizes[1] - sizes[0]) / 1e6, "idle": used * 100}


def claim_cost(entrant: Entrant, place: Place, *, backlog: int, windows: int) -> float:
    """Microseconds for a claim with its settlement, with so many tasks waiting."""
    with setting(entrant, place, 1) as here:
        fill = backlog
        if isinstance(place, RabbitMQ):
            # With ready-made frames: Leveret's own publishing would take most of the benchmark's time.
            Programs(WIRE, place.url(here.queue), here.queue, here.path).produce(0, backlog)
            fill = 0
        numbers = here.programs.ask(("benchmarks.claims",), {"fill": fill, "windows": windows})
        return numbers["claim"] * 1e6


def startup(times: int) -> dict[str, float]:
    """Milliseconds: what `import leveret` takes over bare Python, and `leveret --help` from its start to its end."""
    commands = {"bare": ["-c", "pass"], "import": ["-c", "import leveret"], "help": ["-m", "leveret", "--help"]}
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(times + 1):
        for name, arguments in commands.items():
            began = time.perf_counter()
            command = [sys.executable, *arguments]
            subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True)
            took[name].append((time.perf_counter() - began) * 1e3)
    # Without the first, which compiles what it imports.
    middle = {name: statistics.median(values[1:]) for name, values in took.items()}
    return {"import": middle["import"] - middle["bare"], "help": middle["help"]}


def _cpu_seconds(workers: Sequence[Worker]) -> float:
    return sum(processes.cpu_seconds(processes.family(worker.pid)) for worker in workers)


def _probe(here: Setting, workers: Sequence[Worker]) -> None:
    """A few tasks, to know that the workers are there and warm."""
    here.programs.produce(0, _PROBES)
    here.wait_for_all(workers, _PROBES)
