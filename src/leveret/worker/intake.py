"""What a worker admits of the deliveries that come, and what of those that wait it gives back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from leveret.model import DeadLettered, Delivery, Outcome, Released, wrong_headers
from leveret.worker.job import NOT_RUN, State, attempt_of
from leveret.worker.settler import Redelivery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.executors import Executor
    from leveret.model import CancelRequest, Envelope
    from leveret.worker.job import Job, Jobs
    from leveret.worker.settler import Settler
    from leveret.worker.stopping import Stop

#: A task that came back this often without any outcome has probably taken its workers with it. RabbitMQ 4.0 to 4.2
#: drops a quorum queue's message after 20 returns ("poison message handling"), so it is parked before that.
MAX_RETURNS = 15
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

    def admit(self, batch: Sequence[Delivery], paused: frozenset[str]) -> None:
        """Have the deliveries of a batch wait for slots, but for those that must not run, or not here."""
        fresh = [self._jobs.new(delivery) for delivery in batch if not self._is_known(delivery)]
        cancelled = [job for job in fresh if self._is_cancelled(job)] if self._cancellations else []
        if cancelled:
            self._settler.settle_as(NOT_RUN, cancelled)
            fresh = [job for job in fresh if job not in cancelled]
        self._jobs.wait(fresh)
        if self._stop.is_set():
            self.hand_back()  # dealt in the moment of the stop
        elif paused:
            self.hand_back(paused)

    def cancel(self, request: CancelRequest) -> None:
        """Somebody wants a task to end, or not to run if it comes."""
        self._cancellations.note(request)
        begun = [job for job in self._jobs.begun.values() if self._is_meant(job, request) and job.cancel()]
        running = [job.key for job in begun if job.state is State.RUNNING]
        if running:
            self._executor.cancel(running)
        self._settler.settle_as(NOT_RUN, self._jobs.take_waiting(self._is_cancelled))

    def hand_back(self, queues: frozenset[str] | None = None) -> None:
        """What waits here goes back to its queue; with ``queues``, only what is from those."""
        back = self._jobs.take_waiting(lambda job: queues is None or job.delivery.envelope.queue in queues)
        self._settler.settle_as(Released(), back)

    def hand_back_excess(self, most: int) -> None:
        """What waits beyond the credit may be run by another worker: the newest of it."""
        held = Counter(job.delivery.envelope.queue for job in self._jobs.begun.values())

        def is_excess(job: Job) -> bool:
            held[job.delivery.envelope.queue] += 1
            return held[job.delivery.envelope.queue] > most

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
    wrong = wrong_headers(delivery.envelope.headers)
    if wrong:
        return DeadLettered(wrong)
    expires_at = delivery.envelope.expires_at
    if expires_at is not None and expires_at < now:
        return DeadLettered(f"it expired {now - expires_at:.1f} s before a worker could start it")
    if delivery.returns < MAX_RETURNS:
        return None
    return DeadLettered(
        f"it came back {delivery.returns} times without an outcome: it was being run, or waited, when its worker died "
        "or lost its connection; it may be what kills the workers"
    )
