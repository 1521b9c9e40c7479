"""What the charts show: a short past in memory, of what the dashboard saw. No I/O."""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from leveret.model import QueueStats
from leveret.observe import WorkerRates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.model import WorkerReport

#: How often the broker and the workers are asked (seconds), and so many answers are kept.
STEP = 2.0
KEPT = 150
#: Run times of one step that are looked at: enough for a median.
_MOST_RUNS = 1_000
#: A run time is shown of so many steps together: of one alone it would jump between the tasks that ended in it.
_RUN_STEPS = 15


class Sample(msgspec.Struct, frozen=True):
    """What was seen at one moment."""

    at: float
    queues: dict[str, QueueStats]
    #: Tasks a second since the sample before; None: not known.
    finished: float | None = None
    failed: float | None = None
    #: Seconds that tasks ran which ended lately: of half of them, and of all but the slowest twentieth.
    median: float | None = None
    slow: float | None = None


class Recent:
    """The samples, and what has been counted since the last one."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=KEPT)
        self._runs: deque[list[float]] = deque([[]], maxlen=_RUN_STEPS)
        self._rates = WorkerRates()

    def ran(self, seconds: float) -> None:
        """A task has ended after so long."""
        if len(self._runs[-1]) < _MOST_RUNS:
            self._runs[-1].append(max(0.0, seconds))

    def add(self, now: float, stats: Sequence[QueueStats], workers: Sequence[WorkerReport]) -> None:
        runs = sorted(seconds for step in self._runs for seconds in step)
        self._runs.append([])
        finished, failed = self._rates.look(now, workers)
        self.samples.append(
            Sample(
                now,
                {one.name: one for one in stats},
                finished,
                failed,
                statistics.median(runs) if runs else None,
                runs[int(len(runs) * 0.95)] if runs else None,
            )
        )

    @property
    def latest(self) -> Sample | None:
        return self.samples[-1] if self.samples else None
