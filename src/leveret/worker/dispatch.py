"""Which deliveries a worker runs: what comes waits for a slot or must not run, slots are filled, what ends is settled.

`Intake` admits deliveries to the table of jobs, and hands back some that wait. `Dispatcher` stands between the table
and the executor.
"""

from __future__ import annotations

import random
import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from leveret.executors import Awaits, Blocks, Died, Finished, Overran, Progressed, Returned, RunRequest, Started
from leveret.model import STEPS, DeadLettered, Delivery, Outcome, Released, Retrying, wrong_headers
from leveret.observe import ChildReplaced, TaskBlocks, TaskFinished, TaskStarted
from leveret.worker.job import NOT_RUN, LeaseCheck, State, attempt_of
from leveret.worker.settler import Redelivery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.executors import Executor, ExecutorEvent
    from leveret.model import CancelRequest, Envelope, RetryPolicy
    from leveret.worker.application import Application
    from leveret.worker.awaiting import Awaiting
    from leveret.worker.job import Job, Jobs
    from leveret.worker.prefetch import AdaptiveCredit
    from leveret.worker.reporter import Listeners, WorkerReporter
    from leveret.worker.settler import Settler, StatusUpdates
    from leveret.worker.stopping import Background, Stop

#: A task that came back this often without any outcome has probably taken its workers with it. RabbitMQ 4.0 to 4.2
#: drops a quorum queue's message after 20 returns ("poison message handling"), so it is parked before that.
MAX_RETURNS = 15
#: What came back this often stays here, though it may wait: RabbitMQ before 4.3 counts what is handed back, too.
_MOST_HANDED_BACK = 3
#: So many cancelled tasks are known at once.
_MOST_CANCELLED = 100_000


class Intake:
    """Decides on deliveries and on jobs that wait: each waits for a slot, is settled, or goes back to its queue."""

    def __init__(self, executor: Executor, jobs: Jobs, settler: Settler, stop: Stop) -> None:
        self._executor = executor
        self._jobs = jobs
        self._settler = settler
        self._stop = stop
        self._cancellations = Cancellations()
        #: The queues that are paused.
        self._paused: frozenset[str] = frozenset()
        #: How many of each queue may be held; None: no limit is known.
        self._most: int | None = None

    def admit(self, batch: Sequence[Delivery]) -> None:
        """Have the deliveries of a batch wait for slots, but for those that must not run, or not here."""
        fresh = [self._jobs.new(delivery) for delivery in batch if not self._is_known(delivery)]
        cancelled = [job for job in fresh if self._is_cancelled(job)] if self._cancellations else []
        if cancelled:
            self._settler.settle_as(NOT_RUN, cancelled)
            fresh = [job for job in fresh if job not in cancelled]
        self._jobs.wait(fresh)
        self._hand_back_at_once()  # what was dealt in the moment of a stop, or of a pause

    def take_again(self, jobs: Sequence[Job]) -> None:
        """The executor has given back jobs that had not begun."""
        self._jobs.put_back(jobs)
        self._settler.settle_as(NOT_RUN, self._jobs.take_waiting(lambda job: job.is_cancelled))
        self._hand_back_at_once()
        if self._most is not None:
            self._hand_back_excess(self._most)

    def pause(self, queues: frozenset[str]) -> None:
        """These are paused now, and no others."""
        self._paused = queues
        if queues:
            self._executor.recall()
            self._hand_back(queues)

    def cancel(self, request: CancelRequest) -> None:
        """Somebody wants a task to end, or not to run if it comes."""
        self._cancellations.note(request)
        begun = [job for job in self._jobs.begun.values() if self._is_meant(job, request) and job.cancel()]
        running = [job.key for job in begun if job.state is State.RUNNING]
        if running:
            self._executor.cancel(running)
        self._settler.settle_as(NOT_RUN, self._jobs.take_waiting(self._is_cancelled))

    def hand_back(self) -> None:
        """What has not begun here goes back to its queue."""
        self._executor.recall()
        self._hand_back()

    def limit(self, most: int) -> None:
        """So many of each queue may be held from now on. Another worker may run what is too much: the newest of it."""
        if self._most is None or most < self._most:
            self._executor.recall()
        self._most = most
        self._hand_back_excess(most)

    def _hand_back_at_once(self) -> None:
        if self._stop.is_set():
            self._hand_back()
        elif self._paused:
            self._hand_back(self._paused)

    def _hand_back(self, queues: frozenset[str] | None = None) -> None:
        back = self._jobs.take_waiting(lambda job: queues is None or job.delivery.envelope.queue in queues)
        self._settler.settle_as(Released(), back)

    def _hand_back_excess(self, most: int) -> None:
        held = Counter(job.delivery.envelope.queue for job in self._jobs.begun.values())

        def is_excess(job: Job) -> bool:
            held[job.delivery.envelope.queue] += 1
            return held[job.delivery.envelope.queue] > most and job.delivery.returns < _MOST_HANDED_BACK

        self._settler.settle_as(Released(), self._jobs.take_waiting(is_excess))

    def _is_cancelled(self, job: Job) -> bool:
        return self._cancellations.cover(job.delivery.envelope)

    def _is_meant(self, job: Job, request: CancelRequest) -> bool:
        return job.delivery.envelope.id == request.id and request.covers(job.delivery.envelope)

    def _is_known(self, delivery: Delivery) -> bool:
        """Whether it is one that came before and was lost with its connection: it runs still, or it has run.

        Then that run is this delivery's, and nothing is started again.
        """
        job = self._jobs.begun_as(delivery)
        if job is not None and is_again(delivery, job):
            if job.is_acknowledged:
                self._settler.settle_again(Redelivery(delivery, None))
            else:
                job.delivery = delivery
            return True
        return bool(delivery.returns) and self._settler.is_settled(delivery)


class Cancellations:
    """The latest requests, by task id. One may be read before its task, or together with it."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, CancelRequest] = OrderedDict()

    def note(self, request: CancelRequest) -> None:
        self._requests[request.id] = request
        if len(self._requests) > _MOST_CANCELLED:
            self._requests.popitem(last=False)

    def __bool__(self) -> bool:
        return bool(self._requests)

    def cover(self, envelope: Envelope) -> bool:
        """Whether the task must not run."""
        request = self._requests.get(envelope.id)
        return request is not None and request.covers(envelope)


class Dispatcher:
    """Begins the jobs that wait, in their order, and has settled those that have ended."""

    def __init__(
        self,
        executor: Executor,
        application: Application,
        jobs: Jobs,
        intake: Intake,
        settler: Settler,
        updates: StatusUpdates,
        credit: AdaptiveCredit | None,
        awaiting: Awaiting,
        reporter: WorkerReporter,
        listeners: Listeners,
        background: Background,
        stop: Stop,
    ) -> None:
        self._executor = executor
        self._application = application
        self._jobs = jobs
        self._intake = intake
        self._settler = settler
        self._updates = updates
        self._credit = credit
        self._awaiting = awaiting
        self._reporter = reporter
        self._listeners = listeners
        self._background = background
        self._stop = stop

    def fill(self) -> None:
        """Submit as much of what waits as the executor has slots for, and what is right to send ahead."""
        jobs = self._jobs
        requests: list[RunRequest] = []
        dead: list[Job] = []
        slots = self._executor.slots
        ahead = 0 if self._credit is None else self._credit.ahead(slots)
        room = 0 if self._stop.is_set() else slots + ahead - len(jobs.begun)
        now, is_held = time.time(), LeaseCheck()
        while jobs.waiting and room > 0:
            if room <= ahead and self._application.is_at_most_once(jobs.waiting[0].delivery.envelope):
                break  # acknowledged, it could not be given back
            job = jobs.waiting.popleft()
            if not is_held(job):
                jobs.end(job)  # the broker has given it to another consumer, or will give it to this one again
                continue
            verdict = dead_already(job.delivery, now) or self._cannot_be_followed(job.delivery.envelope)
            if verdict is not None:
                jobs.settle(job, verdict)
                dead.append(job)
                continue
            room -= 1
            if self._application.is_at_most_once(job.delivery.envelope):
                jobs.begin(job, State.ACKNOWLEDGING)
                self._background.start(self._acknowledge(job))
            else:
                jobs.begin(job, State.RUNNING)
                requests.append(RunRequest(job.key, job.delivery.envelope))
        if requests:
            self._executor.submit(requests, ahead=ahead)
        if jobs.begun and self._credit is not None:
            self._credit.decide_soon()
        self._settler.settle(dead)

    def _cannot_be_followed(self, envelope: Envelope) -> Outcome | None:
        """Nothing would be left of a chain whose step is acknowledged, and then lost."""
        if STEPS not in envelope.headers or not self._application.is_at_most_once(envelope):
            return None
        return DeadLettered(
            f"task {envelope.task!r} has acknowledge='before', so it may be lost, and the steps after it with it: it "
            "can be the last step of a chain alone"
        )

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        """The executor tells something: what has ended is settled, its slots are filled again, the rest is told."""
        ended: list[Job] = []
        begun = self._jobs.begun
        for event in events:
            if isinstance(event, Started):
                self._tell_started([begun[key] for key in event.keys if key in begun])
            elif isinstance(event, Returned):
                self._intake.take_again([begun[key] for key in event.keys if key in begun])
            elif isinstance(event, ChildReplaced):
                self._listeners.notify(event)
            elif (job := begun.get(event.key)) is None:
                continue
            elif isinstance(event, (Finished, Died, Overran)):
                self._end(job, event)
                ended.append(job)
            else:
                self._tell(job, event)
        self._reporter.ended(ended)
        self._free_slots(ended)
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
        if self._listeners.are_given:
            self._listeners.notify(TaskFinished(envelope, outcome))
        if job.is_acknowledged:
            self._settler.settle_acknowledged(job, outcome)
        else:
            self._jobs.settle(job, outcome)

    def _tell_started(self, jobs: Sequence[Job]) -> None:
        now = time.monotonic()
        for job in jobs:
            job.began_at = now
        self._updates.started(jobs)
        if self._listeners.are_given:
            for job in jobs:
                self._listeners.notify(TaskStarted(job.delivery.envelope))

    def _tell(self, job: Job, event: Progressed | Awaits | Blocks) -> None:
        if isinstance(event, Progressed):
            if job.is_ours:  # else it may run elsewhere by now, and that run tells
                self._updates.progressed(job, event.progress)
        elif isinstance(event, Awaits):
            self._awaiting.note(job, awaits=event.is_so)
        else:
            self._listeners.notify(TaskBlocks(job.delivery.envelope, event.seconds, event.stack))

    async def _acknowledge(self, job: Job) -> None:
        """Run a job once the broker has forgotten it."""
        if await self._settler.acknowledge(job):
            self._executor.submit([RunRequest(job.key, job.delivery.envelope, once=True)])
        else:
            self._free_slots([job])

    def _free_slots(self, ended: Sequence[Job]) -> None:
        if self._credit is not None:
            self._credit.ended(ended, time.monotonic())
        self.fill()

    def _is_busy(self) -> bool:
        """Whether all slots can be filled once more with what waits here."""
        slots = self._executor.slots
        waiting = len(self._jobs.waiting) + max(0, len(self._jobs.begun) - slots)
        return waiting >= slots and not self._stop.is_set()


def is_again(delivery: Delivery, job: Job) -> bool:
    """Whether a delivery is what a job that has begun has lost."""
    return (
        not job.delivery.lease.held
        and attempt_of(job.delivery) == attempt_of(delivery)
        and delivery.returns < MAX_RETURNS
    )


def dead_already(delivery: Delivery, now: float) -> Outcome | None:
    """Why a delivery must not run at all, if so."""
    if delivery.defect:
        return DeadLettered(delivery.defect)
    envelope = delivery.envelope
    if envelope.headers and (wrong := wrong_headers(envelope.headers)):
        return DeadLettered(wrong)
    expires_at = envelope.expires_at
    if expires_at is not None and expires_at < now:
        return DeadLettered(f"it expired {now - expires_at:.1f} s before a worker could start it")
    if delivery.returns < MAX_RETURNS:
        return None
    return DeadLettered(
        f"it came back {delivery.returns} times without an outcome: it was being run, or waited, when its worker died "
        "or lost its connection; it may be what kills the workers"
    )


def after_death(death: Died | Overran, attempt: int, policy: RetryPolicy, jitter: float) -> Outcome:
    """A death is an attempt. The next one needs no wait, except after a timeout: a child is there already."""
    if policy.may_try_again(attempt):
        wait = policy.delay(attempt, jitter) if isinstance(death, Overran) else 0.0
        return Retrying(death.cause, delay=wait)
    return DeadLettered(f"{death.cause}; attempt {attempt} of {policy.max_attempts} failed")
