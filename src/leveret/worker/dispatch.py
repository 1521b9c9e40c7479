"""Filling the executor's slots with the jobs that wait."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from leveret.executors import RunRequest
from leveret.worker.intake import dead_already
from leveret.worker.job import State

if TYPE_CHECKING:
    from leveret.executors import Executor
    from leveret.worker.application import Application
    from leveret.worker.background import Background
    from leveret.worker.job import Job, Jobs
    from leveret.worker.prefetch import AdaptiveCredit
    from leveret.worker.settler import Settler
    from leveret.worker.stopping import Stop


class Dispatcher:
    """Begins the jobs that wait, in their order, as long as there are slots."""

    def __init__(
        self,
        executor: Executor,
        application: Application,
        jobs: Jobs,
        settler: Settler,
        credit: AdaptiveCredit,
        background: Background,
        stop: Stop,
    ) -> None:
        self._executor = executor
        self._application = application
        self._jobs = jobs
        self._settler = settler
        self._credit = credit
        self._background = background
        self._stop = stop

    @property
    def is_busy(self) -> bool:
        """Whether all slots can be filled once more with what waits here."""
        return len(self._jobs.waiting) >= self._executor.slots and not self._stop.is_set()

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

    async def _acknowledge(self, job: Job) -> None:
        """Run a job once the broker has forgotten it."""
        if await self._settler.acknowledge(job):
            self._executor.submit([RunRequest(job.key, job.delivery.envelope, once=True)])
        else:
            self._credit.ended([job], time.monotonic())
            self.fill()
