"""What the executor tells of the jobs that it runs."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from leveret.executors import Awaits, Blocks, Died, Finished, Overran, Progressed, Started
from leveret.model import DeadLettered, Outcome, Retrying
from leveret.observe import ChildReplaced, TaskBlocks, TaskFinished, TaskStarted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.executors import ExecutorEvent
    from leveret.model import RetryPolicy
    from leveret.worker.application import Application
    from leveret.worker.awaiting import Awaiting
    from leveret.worker.dispatch import Dispatcher
    from leveret.worker.job import Job, Jobs
    from leveret.worker.listeners import Listeners
    from leveret.worker.prefetch import AdaptiveCredit
    from leveret.worker.reporter import WorkerReporter
    from leveret.worker.settler import Settler, StatusUpdates


class Runs:
    """Takes the executor's events: has outcomes settled, the slots filled again, and the rest told."""

    def __init__(
        self,
        application: Application,
        jobs: Jobs,
        dispatcher: Dispatcher,
        settler: Settler,
        updates: StatusUpdates,
        credit: AdaptiveCredit,
        awaiting: Awaiting,
        reporter: WorkerReporter,
        listeners: Listeners,
    ) -> None:
        self._application = application
        self._jobs = jobs
        self._dispatcher = dispatcher
        self._settler = settler
        self._updates = updates
        self._credit = credit
        self._awaiting = awaiting
        self._reporter = reporter
        self._listeners = listeners

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        ended: list[Job] = []
        for event in events:
            if isinstance(event, ChildReplaced):
                self._listeners.notify(event)
                continue
            job = self._jobs.begun.get(event.key)
            if job is None:
                continue
            if isinstance(event, (Finished, Died, Overran)):
                self._end(job, event)
                ended.append(job)
            else:
                self._tell(job, event)
        self._credit.ended(ended, time.monotonic())
        self._dispatcher.fill()
        settling = [job for job in ended if not job.is_acknowledged]
        if settling:
            self._settler.settle_soon(settling, is_busy=self._dispatcher.is_busy)

    def _end(self, job: Job, event: Finished | Died | Overran) -> None:
        envelope = job.delivery.envelope
        if isinstance(event, Finished):
            outcome = job.judged(event.outcome)
            job.seconds = event.seconds
        else:
            policy = self._application.policy(envelope)
            outcome = job.judged(after_death(event, envelope.attempt, policy, random.random()))  # noqa: S311
        self._reporter.ended(outcome)
        if self._listeners.are_given:
            self._listeners.notify(TaskFinished(envelope, outcome))
        if job.is_acknowledged:
            self._settler.settle_acknowledged(job, outcome)
        else:
            self._jobs.settle(job, outcome)

    def _tell(self, job: Job, event: Started | Progressed | Awaits | Blocks) -> None:
        envelope = job.delivery.envelope
        if isinstance(event, Started):
            self._updates.started(job)
            if self._listeners.are_given:
                self._listeners.notify(TaskStarted(envelope))
        elif isinstance(event, Progressed):
            if job.is_ours:  # else it may run elsewhere by now, and that run tells
                self._updates.progressed(job, event.progress)
        elif isinstance(event, Awaits):
            self._awaiting.note(job, awaits=event.is_so)
        else:
            self._listeners.notify(TaskBlocks(envelope, event.seconds, event.stack))


def after_death(death: Died | Overran, attempt: int, policy: RetryPolicy, jitter: float) -> Outcome:
    """A death is an attempt. The next one needs no wait, except after a timeout: a child is there already."""
    if policy.may_try_again(attempt):
        wait = policy.delay(attempt, jitter) if isinstance(death, Overran) else 0.0
        return Retrying(death.cause, delay=wait)
    return DeadLettered(f"{death.cause}; attempt {attempt} of {policy.max_attempts} failed")
