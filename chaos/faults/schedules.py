"""What happens to schedules when whoever keeps them dies, and how even they are when nobody does."""

from __future__ import annotations

import statistics
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

from chaos.faults.fault import Fault
from chaos.stage import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.book import Run
    from chaos.stage import Stage

_APP = f"{ROOT / 'chaos' / 'scheduled.py'}:app"
_WORKERS = 3
#: How often whoever keeps the schedules is killed (seconds).
_EVERY = 7.0
#: What a worker says at DEBUG when it has stored the task of an instant.
_STORED = "schedule 'tick': task tick@"


def keeper_killed(stage: Stage) -> None:
    """Whoever stored the last task is killed again and again, with its children; the other two go on."""
    kills = 0
    with _scheduled(stage):
        ends = time.monotonic() + stage.profile.scheduled
        while time.monotonic() < ends:
            time.sleep(min(_EVERY, stage.profile.scheduled / 3))
            keeper = max(stage.workers, key=lambda worker: _last_stored(worker.output))
            stage.workers.remove(keeper)
            keeper.kill_group()
            stage.fault_ended()
            kills += 1
            stage.add_worker("--log-level", "DEBUG", app=_APP)
    stage.note = f"{_lateness(stage)}; killed {kills} times"


def steady(stage: Stage) -> None:
    """Nothing happens: how far the gaps between two tasks are from a second, and whether that grows."""
    with _scheduled(stage):
        time.sleep(stage.profile.scheduled)
    starts = [run.starts[0] for _, run in _ticks(stage)]
    off = sorted(abs(later - earlier - 1.0) * 1e3 for earlier, later in pairwise(starts))
    late = [start - instant for start, (instant, _) in zip(starts, _ticks(stage), strict=True)]
    few = len(late) // 4
    drift = (statistics.median(late[-few:]) - statistics.median(late[:few])) * 1e3
    stage.note = (
        f"{_lateness(stage)}; gaps differ from a second by {statistics.median(off):.1f} ms (median), "
        f"{off[int(len(off) * 0.95)]:.1f} ms (95 %), {off[-1]:.1f} ms (worst); "
        f"the last quarter begins {drift:+.1f} ms later"
    )


@contextmanager
def _scheduled(stage: Stage) -> Iterator[None]:
    """Three workers with a schedule; left when each instant from the first to the last is known to be done or lost."""
    try:
        for _ in range(_WORKERS):
            stage.add_worker("--log-level", "DEBUG", app=_APP)
        stage.wait_until_ready()
        stage.wait_for(lambda: len(_ticks(stage)) > 1, "the first two instants have come")
        yield
        now = time.time()
        stage.wait_for(lambda: _ticks(stage)[-1][0] > now, "an instant comes after all")
        ticks = [instant for instant, _ in _ticks(stage)]
        # From now on these are the tasks of the ledger, at the moments at which they were due.
        due = range(ticks[0], ticks[-1] + 1)
        stage.book.safe.update({_id(instant): float(instant) for instant in due})
        stage.drain()
        stage.stop_workers()
    finally:
        stage.close()


def _ticks(stage: Stage) -> list[tuple[int, Run]]:
    """The instants whose tasks have begun, in their order."""
    stage.book.read()
    runs = stage.book.tasks.items()
    return sorted((_instant(id_), run) for id_, run in runs if run.starts)


def _instant(id_: str) -> int:
    return int(datetime.fromisoformat(id_.removeprefix("tick@")).timestamp())


def _id(instant: int) -> str:
    return f"tick@{datetime.fromtimestamp(instant, UTC):%Y%m%dT%H%M%SZ}"


def _last_stored(output: str) -> str:
    """The instant of the last task that a worker says it has stored, as it is in the id."""
    return output.rpartition(_STORED)[2][:16] if _STORED in output else ""


def _lateness(stage: Stage) -> str:
    late = [(run.starts[0] - instant) * 1e3 for instant, run in _ticks(stage)]
    return f"begun {statistics.median(late):.1f} ms late (median), {max(late):.1f} ms (worst)"


FAULTS = (
    Fault("keeper-killed", "a schedule; kill -9 of the worker that keeps it, every 7 s", keeper_killed),
    Fault("schedule-steady", "a schedule, and nothing happens: how even it is", steady),
)
