"""What a worker has the broker record: how its tasks ended, and what those who follow them are told.

A delivery that comes again after its connection was lost is settled as its run ended, and does not run a second time.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from leveret.errors import BrokerError, LeaseLost
from leveret.model import (
    DeadLettered,
    Lease,
    Outcome,
    Progress,
    PutOff,
    Released,
    Retrying,
    Status,
    Succeeded,
    settled,
    started,
)
from leveret.observe import LimitedLog, TaskSettled
from leveret.worker.job import NOT_RUN, LeaseCheck, State, attempt_of
from leveret.worker.stopping import Background

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers import Broker
    from leveret.model import Delivery, Envelope, Settlement
    from leveret.worker.application import Application
    from leveret.worker.job import Attempt, Job, Jobs
    from leveret.worker.reporter import Listeners

log = logging.getLogger("leveret.worker")

#: What happens to a task within this time is told as one (seconds): a short task costs one update, at its end.
GATHER = 0.05
#: Longest wait before an outcome that could not be recorded is tried again (seconds).
SETTLE_AGAIN = 5.0
#: Successes are recorded so many at once, or after so long (seconds), as long as other work waits here meanwhile.
_MOST_GATHERED = 64
_GATHER_SUCCESSES = 0.005
#: How long, and how many, outcomes wait for their task to come again (seconds).
_REMEMBERED = 600.0
_MOST_REMEMBERED = 1_000
_GIVEN_UP = DeadLettered("its worker stopped before it had ended")


class StatusUpdates:
    """Tells of the tasks whose results are kept: all but the silent ones."""

    def __init__(self, broker: Broker, application: Application) -> None:
        self._broker = broker
        self._application = application
        #: Jobs whose status has changed and is not told yet, by key.
        self._fresh: dict[int, Job] = {}
        self._warnings = LimitedLog(log)
        self._timer: asyncio.TimerHandle | None = None
        self._telling = Background()

    def started(self, jobs: Iterable[Job]) -> None:
        is_silent, now = self._application.is_silent, time.time()
        for job in jobs:
            envelope = job.delivery.envelope
            if not is_silent(envelope):
                job.status = started(envelope, self._application.name(envelope), now)
                self._tell_soon(job)

    def progressed(self, job: Job, progress: Progress) -> None:
        if job.status is not None:
            job.status = msgspec.structs.replace(job.status, at=time.time(), progress=progress)
            self._tell_soon(job)

    def acknowledged(self, envelope: Envelope) -> Sequence[Status]:
        """The update to record with a task that the broker shall forget, and that runs then."""
        if self._application.is_silent(envelope):
            return ()
        return [settled(envelope, self._application.name(envelope), Released(), time.time())]

    def settled(self, jobs: Iterable[Job]) -> Sequence[Status]:
        """The updates to record with the outcomes of these jobs."""
        now = time.time()
        updates: list[Status] = []
        for job in jobs:
            envelope, running = job.delivery.envelope, job.status
            if running is None and self._application.is_silent(envelope):
                continue
            update = settled(envelope, self._application.name(envelope), job.outcome, now)
            if running is not None:
                # It was told of, so its end is too, though it may have become silent meanwhile.
                update = msgspec.structs.replace(update, started_at=running.started_at, progress=running.progress)
                self._drop(job)
            updates.append(update)
        return updates

    def forget(self, jobs: Iterable[Job]) -> None:
        """Tell no more of jobs whose delivery was lost: whoever has it now tells."""
        for job in jobs:
            self._drop(job)

    def stop(self) -> None:
        """Tell no more; what is on its way is given up."""
        if self._timer is not None:
            self._timer.cancel()
        self._telling.cancel()
        self._warnings.flush()

    def _drop(self, job: Job) -> None:
        job.status = None
        self._fresh.pop(job.key, None)

    def _tell_soon(self, job: Job) -> None:
        self._fresh[job.key] = job
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER, self._begin_telling)

    def _begin_telling(self) -> None:
        self._timer = None
        updates = [job.status for job in self._fresh.values() if job.status is not None]
        self._fresh.clear()
        if updates:
            self._telling.start(self._tell(updates))

    async def _tell(self, updates: Sequence[Status]) -> None:
        try:
            await self._broker.statuses.notify(updates)
        except BrokerError as error:
            self._warnings.warning("the progress of %d tasks could not be told: %s", len(updates), error)


class Redelivery(NamedTuple):
    """A delivery that came again, and what is to be recorded of it; None: that is done, it is only acknowledged."""

    delivery: Delivery
    outcome: Outcome | None


class _Ended(msgspec.Struct, frozen=True):
    """``lease``: what it was recorded by. ``outcome``: what is still to be recorded, after the lease was lost."""

    lease: Lease | None
    outcome: Outcome | None
    until: float


class RedeliveryCache:
    """The outcomes of late, by attempt: an acknowledgment may be lost with its connection, and nobody is told.

    While an outcome is recorded, its job is in the table (`Jobs.settling_as`).
    """

    def __init__(self) -> None:
        #: The oldest first, as they were recorded together. Many come here, and few are ever asked for.
        self._ended: deque[list[tuple[Attempt, _Ended]]] = deque()
        self._count = 0
        #: The same by attempt, from when it is asked for until it changes.
        self._attempts: dict[Attempt, _Ended] | None = None

    def settled(self, jobs: Iterable[Job], lost: frozenset[str]) -> Sequence[Redelivery]:
        """Outcomes are recorded, but for the ids whose lease was lost; the deliveries that came again meanwhile."""
        until = time.monotonic() + _REMEMBERED
        # What is recorded is only acknowledged again: a second copy would run, or be dead, beside the first.
        ended = [(job, _ended(job, lost, until)) for job in jobs]
        self._remember([(attempt_of(job.delivery), end) for job, end in ended])
        return [Redelivery(job.again, end.outcome) for job, end in ended if job.again is not None]

    def acknowledged(self, delivery: Delivery) -> None:
        """It is acknowledged, and runs only then."""
        ended = _Ended(delivery.lease, None, time.monotonic() + _REMEMBERED)
        self._remember([(attempt_of(delivery), ended)])

    def find(self, delivery: Delivery) -> Redelivery | None:
        """What is to be done about a delivery that came again; None: it is to be run."""
        if self._attempts is None:
            self._attempts = {attempt: ended for together in self._ended for attempt, ended in together}
        ended = self._attempts.get(attempt_of(delivery))
        if ended is None or time.monotonic() > ended.until or (ended.lease is not None and ended.lease.held):
            return None
        return Redelivery(delivery, ended.outcome)

    def _remember(self, together: list[tuple[Attempt, _Ended]]) -> None:
        if not together:
            return
        self._ended.append(together)
        self._attempts = None
        self._count += len(together)
        while self._count - len(self._ended[0]) >= _MOST_REMEMBERED:
            self._count -= len(self._ended.popleft())


def _ended(job: Job, lost: frozenset[str], until: float) -> _Ended:
    if lost and job.delivery.envelope.id in lost:
        return _Ended(None, job.outcome, until)
    return _Ended(job.delivery.lease, None, until)


class Settler:
    """Has the outcomes of jobs recorded, tells the listeners, and knows what was settled when it comes again."""

    def __init__(
        self, broker: Broker, jobs: Jobs, updates: StatusUpdates, listeners: Listeners, background: Background
    ) -> None:
        self._broker = broker
        self._jobs = jobs
        self._updates = updates
        self._listeners = listeners
        self._background = background
        self._redeliveries = RedeliveryCache()
        #: Successes that are recorded in a moment.
        self._gathered: list[Job] = []
        self._timer: asyncio.TimerHandle | None = None
        self._warnings = LimitedLog(log)

    def settle_as(self, outcome: Outcome, jobs: Sequence[Job]) -> None:
        """Give all these jobs one outcome, and have it recorded."""
        for job in jobs:
            self._jobs.settle(job, outcome)
        self.settle(jobs)

    def settle(self, jobs: Sequence[Job]) -> None:
        """Have the outcomes of jobs recorded that are SETTLING."""
        if jobs:
            self._background.start(self._settle(jobs))

    def settle_soon(self, jobs: Sequence[Job], *, is_busy: bool) -> None:
        """The same, with successes gathered while the worker is busy.

        Else the broker may have to have them before it sends what could run meanwhile.
        """
        self._gathered += jobs
        if not is_busy or len(self._gathered) >= _MOST_GATHERED or not all(map(_has_succeeded, jobs)):
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_GATHER_SUCCESSES, self.flush)

    def flush(self) -> None:
        """Have recorded what is gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        gathered, self._gathered = self._gathered, []
        self.settle(gathered)

    def settle_acknowledged(self, job: Job, outcome: Outcome) -> None:
        """A job has ended that was acknowledged before it ran: it does not run again."""
        self._jobs.settle(job, final(outcome))
        self._background.start(self._tell_of_acknowledged(job, outcome))

    def give_up(self, jobs: Iterable[Job]) -> None:
        """The executor has ended with these jobs in it."""
        back: list[Job] = []
        for job in jobs:
            if job.is_acknowledged:
                self.settle_acknowledged(job, Released())
            elif job.state is State.ACKNOWLEDGING:
                self._jobs.settle(job, _GIVEN_UP)  # `acknowledge` goes on, and tells
            else:
                back.append(job)
        self.settle_as(Released(), back)

    async def acknowledge(self, job: Job) -> bool:
        """Have the broker forget a job before it runs; False: it must not run.

        If its delivery is lost first and comes again, that one is meant.
        """
        delivery = job.delivery
        while await self._record([(delivery, Succeeded())], self._updates.acknowledged(delivery.envelope)):
            if job.delivery is delivery or job.state is not State.ACKNOWLEDGING:
                self._jobs.end(job)
                return False
            delivery = job.delivery
        if job.state is not State.ACKNOWLEDGING:
            await self._tell_of_acknowledged(job, Released())
            return False
        self._redeliveries.acknowledged(delivery)
        job.acknowledged()
        if job.is_cancelled:  # meanwhile
            self.settle_acknowledged(job, NOT_RUN)
        return not job.is_cancelled

    def is_settled(self, delivery: Delivery) -> bool:
        """Whether a delivery came again whose task has run: its outcome is, or will be, recorded by it."""
        job = self._jobs.settling_as(delivery)
        if job is not None and not job.delivery.lease.held:
            job.again = delivery
            return True
        redelivery = self._redeliveries.find(delivery)
        if redelivery is not None:
            self.settle_again(redelivery)
        return redelivery is not None

    def settle_again(self, redelivery: Redelivery) -> None:
        """Settle a delivery that came again, as its run ended."""
        if redelivery.outcome is None:
            self._background.start(self._acknowledge_again(redelivery.delivery))
        else:
            self.settle_as(redelivery.outcome, [self._jobs.new(redelivery.delivery)])

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._warnings.flush()

    async def _settle(self, jobs: Sequence[Job]) -> None:
        is_held = LeaseCheck()
        held = [job for job in jobs if is_held(job)]
        updates = self._updates.settled(held)
        if len(held) < len(jobs):
            self._updates.forget([job for job in jobs if not is_held(job)])
        lost = await self._record([(job.delivery, job.outcome) for job in jobs], updates)
        recorded = [job for job in jobs if self._jobs.end(job)]
        for redelivery in self._redeliveries.settled(recorded, lost):
            self.settle_again(redelivery)
        self._notify(jobs, lost)

    def _notify(self, jobs: Iterable[Job], lost: frozenset[str]) -> None:
        are_heard = self._listeners.hear_successes
        for job in jobs:
            if are_heard or lost or not isinstance(job.outcome, Succeeded):
                envelope = job.delivery.envelope
                kept = envelope.id not in lost
                self._listeners.notify(TaskSettled(envelope, job.outcome, kept=kept, seconds=job.seconds))

    async def _acknowledge_again(self, delivery: Delivery) -> None:
        """Everything else is recorded, and told."""
        await self._record([(delivery, Succeeded())])

    async def _tell_of_acknowledged(self, job: Job, outcome: Outcome) -> None:
        await self._record((), self._updates.settled([job]))
        self._jobs.end(job)
        told = job.outcome if isinstance(outcome, Released) else outcome
        self._listeners.notify(TaskSettled(job.delivery.envelope, told, at_most_once=True, seconds=job.seconds))

    async def _record(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> frozenset[str]:
        """Settle, again and again while the broker can't; the ids whose lease was lost."""
        while True:
            try:
                await self._broker.settle(settlements, updates)
            except LeaseLost as error:
                return frozenset(error.ids)
            except Exception as error:
                if not isinstance(error, BrokerError):
                    log.exception("a mistake in Leveret or its drivers: %d outcomes are not recorded", len(settlements))
                pause = random.uniform(SETTLE_AGAIN / 10, SETTLE_AGAIN)  # noqa: S311 - jitter
                self._warnings.warning(
                    "%d outcomes can't be recorded, trying again in %.1f s: %s", len(settlements), pause, error
                )
                await asyncio.sleep(pause)
            else:
                return frozenset()


def final(outcome: Outcome) -> Outcome:
    """What becomes of a task that was acknowledged before it ran, and cannot run again."""
    if isinstance(outcome, Released):
        return _GIVEN_UP
    if isinstance(outcome, PutOff):
        return DeadLettered(f"limit {outcome.limit!r} put it off, and it does not run again (acknowledge='before')")
    return DeadLettered(outcome.error, outcome.traceback) if isinstance(outcome, Retrying) else outcome


def _has_succeeded(job: Job) -> bool:
    return isinstance(job.outcome, Succeeded)
