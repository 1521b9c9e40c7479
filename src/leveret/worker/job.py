"""A job is one delivery on its way through the worker; `Jobs` is the table of all of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.model import Cancelled, Delivery, Outcome, Released, Status, Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from leveret.model import Lease

Attempt: TypeAlias = tuple[str, str, int, "float | None", "str | None", int, str]

NOT_RUN = Cancelled("cancelled before it ran")
_CANCELLED = Cancelled("cancelled while it ran")
_STOPPED = Cancelled("cancelled while it ran; it succeeded, and the steps after it do not run")


class State(IntEnum):
    """Where a job is."""

    #: The worker holds it; it has no slot of the executor yet.
    WAITING = 1
    #: It has a slot. The broker is to forget it before it runs (``acknowledge="before"``).
    ACKNOWLEDGING = 2
    #: The executor has it: it runs, or is about to.
    RUNNING = 3
    #: It has an outcome, which the broker is to record.
    SETTLING = 4
    #: The worker has nothing more to do with it.
    ENDED = 5


_STEPS: dict[State, tuple[State, ...]] = {
    State.WAITING: (State.ACKNOWLEDGING, State.RUNNING, State.SETTLING, State.ENDED),
    State.ACKNOWLEDGING: (State.RUNNING, State.SETTLING, State.ENDED),
    State.RUNNING: (State.WAITING, State.SETTLING),
    State.SETTLING: (State.ENDED,),
    State.ENDED: (),
}


class IllegalStep(RuntimeError):
    """A mistake in the worker: a job cannot go from the one state to the other."""

    def __init__(self, now: State, to: State) -> None:
        super().__init__(f"a job that is {now.name} cannot become {to.name}")


def attempt_of(delivery: Delivery) -> Attempt:
    """Identify one attempt at a task: an id may be used again, by a dead letter that was put back, say."""
    envelope = delivery.envelope
    # A foreign producer may give all its messages one id: their content keeps them apart.
    content = hash(envelope.body)
    return (
        *(envelope.queue, envelope.id, envelope.attempt, envelope.enqueued_at),
        *(envelope.task, content, delivery.defect),
    )


class Job(msgspec.Struct, eq=False):
    """One delivery, from its arrival until the broker has its outcome. `Jobs` makes it and keeps it in its indexes."""

    key: int
    delivery: Delivery
    state: State = State.WAITING
    #: When its task began (monotonic, seconds); 0: it has not.
    began_at: float = 0.0
    #: Since when it waits for the results of tasks that have not begun (monotonic, seconds); None: it does not.
    awaits_since: float | None = None
    #: How long it ran (seconds); None: it did not, or its process died.
    seconds: float | None = None
    #: What is told of it while it runs, with its progress; None: nothing.
    status: Status | None = None
    #: It is to end, or not to run; the executor is told if it has it.
    is_cancelled: bool = False
    #: The broker had forgotten it before it ran.
    is_acknowledged: bool = False
    #: What the broker is to record; without a run it is handed back.
    outcome: Outcome = Released()
    #: Its delivery that came again while its outcome was recorded; the newest.
    again: Delivery | None = None

    def step(self, to: State) -> None:
        """Go on to another state. Raises IllegalStep."""
        if to not in _STEPS[self.state]:
            raise IllegalStep(self.state, to)
        self.state = to

    def acknowledged(self) -> None:
        """The broker has forgotten it, and it runs now."""
        self.step(State.RUNNING)
        self.is_acknowledged = True

    def cancel(self) -> bool:
        """Have it end, or not run. Whether this is the first time."""
        is_first = not self.is_cancelled
        self.is_cancelled = True
        return is_first

    def judged(self, outcome: Outcome) -> Outcome:
        """Its outcome after a run: a job that was to end, and did not succeed in spite of it, is cancelled.

        So is one that succeeded, if others would follow it.
        """
        if self.is_cancelled and isinstance(outcome, Succeeded) and outcome.follow_ups:
            return _STOPPED
        if not self.is_cancelled or isinstance(outcome, (Succeeded, Cancelled)):
            return outcome
        return _CANCELLED

    @property
    def is_ours(self) -> bool:
        """Whether no other worker can have it by now."""
        return self.is_acknowledged or self.delivery.lease.held


class LeaseCheck:
    """Whether leases are held at this moment. Asked once for all jobs in a row that have the same: it is not cheap."""

    def __init__(self) -> None:
        self._lease: Lease | None = None
        self._is_held = False

    def __call__(self, job: Job) -> bool:
        lease = job.delivery.lease
        if lease is not self._lease:
            self._lease, self._is_held = lease, lease.held
        return self._is_held


class Jobs:
    """The jobs of a worker, by what is asked of them. Every step that changes an index is taken here."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        #: Jobs that are WAITING, in the order in which they came.
        self.waiting: deque[Job] = deque()
        #: Jobs that are ACKNOWLEDGING or RUNNING, by key: each holds a slot, or waits in the executor for one.
        self.begun: dict[int, Job] = {}
        #: The same by queue and task id: of two with one id the newer.
        self._by_task: dict[tuple[str, str], Job] = {}
        #: Jobs that are SETTLING and whose outcome is recorded, so that they must not run again, by key.
        self._settling: dict[int, Job] = {}
        #: The same by attempt, from when it is asked for until it changes.
        self._settling_attempts: dict[Attempt, Job] | None = None
        #: How many have held a slot and do not any more.
        self.left = 0
        self._none_begun = asyncio.Event()
        self._none_begun.set()

    @property
    def held(self) -> int:
        """How many wait or have begun."""
        return len(self.waiting) + len(self.begun)

    def running(self, slots: int) -> int:
        """How many hold a slot: of those that have begun, the others wait where they are to run."""
        return min(len(self.begun), slots)

    def new(self, delivery: Delivery) -> Job:
        """Make a job that is in no index yet."""
        return Job(next(self._keys), delivery)

    def wait(self, jobs: Iterable[Job]) -> None:
        """Put new jobs behind those that wait."""
        self.waiting.extend(jobs)

    def take_waiting(self, is_wanted: Callable[[Job], bool]) -> list[Job]:
        """Remove from those that wait, asking of each in turn. The caller settles them."""
        taken: list[Job] = []
        kept: deque[Job] = deque()
        for job in self.waiting:
            (taken if is_wanted(job) else kept).append(job)
        self.waiting = kept
        return taken

    def begin(self, job: Job, state: State) -> None:
        """Give a job that was taken from those that wait to the executor, or have it acknowledged first."""
        job.step(state)
        if not self.begun:
            self._none_begun.clear()
        self.begun[job.key] = job
        envelope = job.delivery.envelope
        self._by_task[envelope.queue, envelope.id] = job

    def put_back(self, jobs: Sequence[Job]) -> None:
        """The executor has given back these, and has not run them: they wait again, before the others."""
        for job in jobs:
            job.step(State.WAITING)
            self._leave_slot(job)
        self.waiting.extendleft(reversed(jobs))

    def begun_as(self, delivery: Delivery) -> Job | None:
        """The job of the same queue and task id that holds a slot."""
        envelope = delivery.envelope
        return self._by_task.get((envelope.queue, envelope.id))

    def settling_as(self, delivery: Delivery) -> Job | None:
        """The job of the same attempt whose outcome is being recorded."""
        if self._settling_attempts is None:
            self._settling_attempts = {attempt_of(job.delivery): job for job in self._settling.values()}
        return self._settling_attempts.get(attempt_of(delivery))

    def settle(self, job: Job, outcome: Outcome) -> None:
        """A job has its outcome: it waits no more, and its slot is free."""
        job.step(State.SETTLING)
        job.outcome = outcome
        self._free_slot(job)
        if not (job.is_acknowledged or isinstance(outcome, Released)):
            self._settling[job.key] = job
            self._settling_attempts = None

    def end(self, job: Job) -> bool:
        """The worker is done with a job; whether its outcome is recorded."""
        job.step(State.ENDED)
        is_recorded = self._settling.pop(job.key, None) is not None
        if is_recorded:
            self._settling_attempts = None
        else:
            self._free_slot(job)
        return is_recorded

    async def until_none_begun(self) -> None:
        await self._none_begun.wait()

    def _free_slot(self, job: Job) -> None:
        if job.key in self.begun:
            self._leave_slot(job)
            self.left += 1

    def _leave_slot(self, job: Job) -> None:
        del self.begun[job.key]
        envelope = job.delivery.envelope
        task = envelope.queue, envelope.id
        if self._by_task.get(task) is job:
            del self._by_task[task]
        if not self.begun:
            self._none_begun.set()
