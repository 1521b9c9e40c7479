"""What a worker tells of itself: events to its log and listeners, and a report to whoever asks."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.model import ChildReport, DeadLettered, Retrying, WorkerReport, this_process
from leveret.observe import write_log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from leveret.observe import Event, Listener
    from leveret.worker.job import Job

log = logging.getLogger("leveret.worker")


class Listeners:
    """The log and whoever else listens to a worker. One that fails is logged, and harms nothing."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._all = (write_log, *listeners)
        #: Whether anybody but the log listens.
        self.are_given = bool(listeners)

    @property
    def hear_successes(self) -> bool:
        """Whether anybody wants to know of a task that is done: nearly all events are such."""
        return self.are_given or log.isEnabledFor(logging.INFO)

    def notify(self, event: Event) -> None:
        for listener in self._all:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", type(event).__name__)


class WorkerReporter:
    """Counts what has ended; the rest is looked up when somebody asks.

    ``held``: how many deliveries the worker has. ``default_tasks``: by queue, of messages that name none.
    """

    def __init__(
        self,
        queues: Sequence[str],
        default_tasks: Mapping[str, str],
        children: Callable[[], Sequence[ChildReport]],
        held: Callable[[], int],
    ) -> None:
        self._queues = list(queues)
        self._default_tasks = default_tasks
        self._children = children
        self._held = held
        self._started_at = time.time()
        self._finished = 0
        self._failed = 0

    def ended(self, jobs: Sequence[Job]) -> None:
        self._finished += len(jobs)
        self._failed += sum(isinstance(job.outcome, (Retrying, DeadLettered)) for job in jobs)

    def __call__(self) -> WorkerReport:
        children = [self._named(child) for child in self._children()]
        running = sum(len(child.running) for child in children)
        return WorkerReport(
            name=this_process(),
            started_at=self._started_at,
            queues=self._queues,
            children=children,
            waiting=max(0, self._held() - running),
            finished=self._finished,
            failed=self._failed,
        )

    def _named(self, child: ChildReport) -> ChildReport:
        running = [
            msgspec.structs.replace(one, task=one.task or self._default_tasks.get(one.queue)) for one in child.running
        ]
        return msgspec.structs.replace(child, running=sorted(running, key=lambda one: one.since))
