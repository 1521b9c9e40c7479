"""Between the table of jobs and the executor: its slots are filled with jobs that wait, and what it tells is taken."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from leveret.executors import Awaits, Blocks, Died, Finished, Overran, Progressed, RunRequest, Started
from leveret.model import DeadLettered, Outcome, Retrying
from leveret.observe import ChildReplaced, TaskBlocks, TaskFinished, TaskStarted
from leveret.worker.intake import dead_already
from leveret.worker.job import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.executors import Executor, ExecutorEvent
    from leveret.model import RetryPolicy
    from leveret.worker.application import Application
    from leveret.worker.awaiting import Awaiting
    from leveret.worker.job import Job, Jobs
    from leveret.worker.prefetch import AdaptiveCredit
    from leveret.worker.reporter import Listeners, WorkerReporter
    from leveret.worker.settler import Settler, StatusUpdates
    from leveret.worker.stopping import Background, Stop


class Dispatcher:
    """Begins the jobs that wait, in their order, and has settled those that have ended."""

    def __init__(
        self,
        executor: Executor,
        application: Application,
        jobs: Jobs,
        settler: Settler,
        updates: StatusUpdates,
        credit: AdaptiveCredit,
        awaiting: Awaiting,
        reporter: WorkerReporter,
        listeners: Listeners,
        background: Background,
        stop: Stop,
    ) -> None:
        self._executor = executor
        self._application = application
        self._jobs = jobs
        self._settler = settler
        self._updates = updates
        self._credit = credit
        self._awaiting = awaiting
        self._reporter = reporter
        self._listeners = listeners
        self._background = background
        self._stop = stop

    def fill(self) -> None:
        """Submit as much of what waits as the executor has slots for."""
        jobs = self._jobs
        requests: list[RunRequest] = []
        dead: list[Job] = []
        room = 0 if self._stop.is_set() else self._executor.slots - len(jobs.begun)
        now, clock = time.time(), time.monotonic()
        while jobs.waiting and room > 0:
            job = jobs.waiting.popleft()
            if not job.delivery.lease.held:
                jobs.end(job)  # the broker has given it to another consumer, or will give it to this one again
                continue
            verdict = dead_already(job.delivery, now)
            if verdict is not None:
                jobs.settle(job, verdict)
                dead.append(job)
                continue
            room -= 1
            if self._application.is_at_most_once(job.delivery.envelope):
                jobs.begin(job, State.ACKNOWLEDGING, clock)
                self._background.start(self._acknowledge(job))
            else:
                jobs.begin(job, State.RUNNING, clock)
                requests.append(RunRequest(job.key, job.delivery.envelope))
        if requests:
            self._executor.submit(requests)
        if jobs.begun:
            self._credit.decide_soon()
        self._settler.settle(dead)

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        """The executor tells something: what has ended is settled, its slots are filled again, the rest is told."""
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
        self.fill()
        settling = [job for job in ended if not job.is_acknowledged]
        if settling:
            self._settler.settle_soon(settling, is_busy=self._is_busy())

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

    async def _acknowledge(self, job: Job) -> None:
        """Run a job once the broker has forgotten it."""
        if await self._settler.acknowledge(job):
            self._executor.submit([RunRequest(job.key, job.delivery.envelope, once=True)])
        else:
            self._credit.ended([job], time.monotonic())
            self.fill()

    def _is_busy(self) -> bool:
        """Whether all slots can be filled once more with what waits here."""
        return len(self._jobs.waiting) >= self._executor.slots and not self._stop.is_set()


def after_death(death: Died | Overran, attempt: int, policy: RetryPolicy, jitter: float) -> Outcome:
    """A death is an attempt. The next one needs no wait, except after a timeout: a child is there already."""
    if policy.may_try_again(attempt):
        wait = policy.delay(attempt, jitter) if isinstance(death, Overran) else 0.0
        return Retrying(death.cause, delay=wait)
    return DeadLettered(f"{death.cause}; attempt {attempt} of {policy.max_attempts} failed")
