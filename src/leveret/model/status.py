"""What has become of a task: the updates that tell of it, and how they add up. Values and pure functions, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import msgspec

from leveret.model.bounds import Count, Name, Text, UnixTime, decoded
from leveret.model.names import is_name, this_process
from leveret.model.outcomes import Cancelled, DeadLettered, Outcome, PutOff, Released, Retrying
from leveret.model.text import brief, moment, shorten

if TYPE_CHECKING:
    from leveret.model.messages import DeadLetter, Envelope

#: queued: ready, or held by a worker that has not begun it. retrying: an attempt failed, and another one will come.
State: TypeAlias = Literal["queued", "delayed", "running", "retrying", "succeeded", "dead", "cancelled"]
#: States that do not change by themselves any more.
FINAL: frozenset[State] = frozenset({"succeeded", "dead", "cancelled"})
_WAITING: frozenset[State] = frozenset({"queued", "delayed", "retrying"})
#: So much is kept of a task's past (moments), and of an error there (characters).
MOST_MOMENTS = 30
_MAX_ERROR = 200
#: A message's body that is longer is not kept with the status (bytes).
MOST_BODY = 2_048
#: What is decoded may hold more than this version writes, but not any amount (bytes; moments).
_LONGEST_BODY = 65_536
_LONGEST_HISTORY = 1_000
#: How far the clocks of programs and brokers may be apart (seconds).
MOST_SKEW = 30.0
FROM_THE_FUTURE = (
    f"a cancellation from more than {MOST_SKEW:g} s in the future is ignored: it is forged, or a clock is wrong"
)
NO_RESULT = msgspec.Raw(b"")
#: How long a task's outcome is kept (seconds).
KEEP = 3_600.0


class Progress(msgspec.Struct, frozen=True, array_like=True):
    """How far a running task says that it is."""

    done: float
    total: float | None = None
    note: Text = ""


class Moment(msgspec.Struct, frozen=True, array_like=True):
    """What a task was before: one line of its history."""

    at: UnixTime
    state: State
    attempt: Count
    #: What ended the attempt, shortened.
    error: Text = ""


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of one task; also the update that made it so.

    The bounds hold for what is decoded: see `status_of`.
    """

    id: Name
    state: State
    #: Unix time of the last change.
    at: UnixTime
    queue: Name
    task: Name | None = None
    #: The attempt that runs, ran last, or comes next.
    attempt: Count = 1
    #: Unix times; None: not known, or not yet.
    enqueued_at: UnixTime | None = None
    started_at: UnixTime | None = None
    #: delayed, retrying: when it will run.
    due: UnixTime | None = None
    #: What ended the last failed attempt; of a dead or cancelled task the reason.
    error: Text | None = None
    traceback: Text = ""
    progress: Progress | None = None
    #: The result as JSON; empty when there is none, or it was not stored.
    encoded_result: msgspec.Raw = msgspec.field(default=NO_RESULT, name="result")
    #: Why a task that succeeded has no result to show.
    problem: Text = ""
    #: The worker that said so.
    worker: Text | None = None
    #: Told by the producer: it may come late, and says nothing new then.
    first: bool = False
    #: The message's body, with the arguments in it; None: not known, or longer than `MOST_BODY`.
    body: Annotated[bytes, msgspec.Meta(max_length=_LONGEST_BODY)] | None = None
    #: What it was before, the oldest first; of many the latest.
    history: Annotated[list[Moment], msgspec.Meta(max_length=_LONGEST_HISTORY)] = []

    @property
    def is_final(self) -> bool:
        return self.state in FINAL

    @property
    def has_result(self) -> bool:
        return bool(bytes(self.encoded_result))

    @property
    def result(self) -> Any:
        """What the task returned, as plain JSON values; `Handle.result` gives it as the task's annotation says.

        None as well while there is none, or when it failed or was not kept: `has_result`, `error` and `problem` tell.
        """
        return msgspec.json.decode(self.encoded_result) if self.has_result else None

    def __repr__(self) -> str:
        """In one line: without the body, the traceback and the history."""
        return brief(
            "Status",
            id=self.id,
            state=self.state,
            task=self.task,
            queue=self.queue,
            attempt=self.attempt,
            at=moment(self.at),
            due=moment(self.due),
            progress=self.progress,
            result=self.result,
            error=self.error,
            problem=self.problem or None,
            worker=self.worker,
        )


class CancelRequest(msgspec.Struct, frozen=True, array_like=True):
    """Somebody cancelled the task with that id, at that Unix time: what was enqueued later is another task."""

    id: Name
    at: UnixTime

    def is_from_the_future(self, now: float) -> bool:
        """It would cancel tasks that nobody has enqueued yet: whoever wrote it forged it, or has a wrong clock."""
        return self.at > now + MOST_SKEW

    def covers(self, envelope: Envelope) -> bool:
        return envelope.enqueued_at is None or envelope.enqueued_at <= self.at


_decode = msgspec.json.Decoder(Status).decode


def status_of(encoded: bytes | str) -> Status | None:
    """An update, or what is recorded; None for what is none, or out of bounds. Anybody may have written it."""
    status = decoded(_decode, encoded)
    return status if status is not None and is_plausible(status) else None


def is_plausible(status: Status) -> bool:
    """Whether a broker could be asked for what an update names: names are counted in bytes."""
    return is_name(status.queue) and is_name(status.id) and (status.task is None or is_name(status.task))


def enqueued(envelope: Envelope, now: float) -> Status:
    """What a producer says of a task that it has stored."""
    delayed = envelope.due is not None and envelope.due > now
    return Status(
        envelope.id,
        "delayed" if delayed else "queued",
        now,
        envelope.queue,
        envelope.task,
        envelope.attempt,
        envelope.enqueued_at,
        due=envelope.due if delayed else None,
        first=True,
        body=kept_body(envelope.body),
    )


def kept_body(body: bytes) -> bytes | None:
    """What a status keeps of a message's body."""
    return body if len(body) <= MOST_BODY else None


def started(envelope: Envelope, task: str | None, now: float) -> Status:
    return Status(
        envelope.id,
        "running",
        now,
        envelope.queue,
        task,
        envelope.attempt,
        envelope.enqueued_at,
        started_at=now,
        error=envelope.last_error,
        worker=this_process(),
        body=kept_body(envelope.body),
    )


def settled(envelope: Envelope, task: str | None, outcome: Outcome, now: float) -> Status:
    """What a worker says of a task whose outcome it records."""
    base = Status(
        *(envelope.id, "queued", now, envelope.queue, task, envelope.attempt, envelope.enqueued_at),
        worker=this_process(),
        body=kept_body(envelope.body),
    )
    if isinstance(outcome, Retrying):
        return msgspec.structs.replace(
            base,
            state="retrying",
            attempt=envelope.attempt + 1,
            due=now + outcome.delay if outcome.delay else None,
            error=outcome.error,
            traceback=outcome.traceback,
        )
    if isinstance(outcome, DeadLettered):
        return msgspec.structs.replace(base, state="dead", error=outcome.reason, traceback=outcome.traceback)
    if isinstance(outcome, Cancelled):
        return msgspec.structs.replace(base, state="cancelled", error=outcome.reason)
    if isinstance(outcome, (Released, PutOff)):
        return msgspec.structs.replace(base, error=envelope.last_error)
    result = NO_RESULT if outcome.result is None else msgspec.Raw(outcome.result)
    return msgspec.structs.replace(base, state="succeeded", encoded_result=result, problem=outcome.problem)


def back(status: Status, now: float) -> Status:
    """A task whose worker is gone: it waits again."""
    return _update_of(status, state="queued", at=now, worker=None, progress=None)


def revived_again(status: Status, now: float) -> Status:
    """A dead task that was put back."""
    return _update_of(status, state="queued", at=now, attempt=1, traceback="", worker=None, progress=None)


def still(status: Status, now: float) -> Status:
    """A dead task that was to be put back, and could not be."""
    return _update_of(status, at=now)


def buried(letter: DeadLetter) -> Status:
    """A dead letter of which nothing else is known."""
    envelope = letter.envelope
    return Status(
        envelope.id,
        "dead",
        letter.died_at or 0.0,
        envelope.queue,
        envelope.task,
        envelope.attempt,
        envelope.enqueued_at,
        error=letter.reason,
        traceback=letter.traceback,
        worker=letter.worker,
        body=kept_body(envelope.body),
    )


def cancelled_before(status: Status, now: float) -> Status:
    """A task that waited, and will not run."""
    return _update_of(status, state="cancelled", at=now, due=None, error="cancelled before it ran", worker=None)


def purged(status: Status, now: float) -> Status:
    """A task that waited, and was deleted with all others of its queue."""
    return msgspec.structs.replace(cancelled_before(status, now), error="its queue was purged or deleted")


def _update_of(status: Status, **changes: Any) -> Status:
    """The next update of a task: what is known of it, without what only those who read keep."""
    return msgspec.structs.replace(status, first=False, history=[], **changes)


def cancelled_running(status: Status, now: float) -> Status:
    """A task that was cancelled while a worker had it, who would have had it run again."""
    return msgspec.structs.replace(cancelled_before(status, now), error="cancelled")


def newer(known: Status | None, update: Status) -> Status:
    """What is known after an update, in the order in which the broker tells them."""
    if known is None:
        return update
    if update.first:
        # Late, unless it is another task, for which the id was used again.
        return update if known.is_final and _later(update, known) else known
    if update.worker is not None and update.worker == known.worker and update.at < known.at:
        return known  # what a worker tells while a task runs may be overtaken by how it ended
    if known.is_final and not update.is_final and update.worker is not None and update.at < known.at:
        return known  # told by a worker that had lost the task to the one that ended it
    if known.is_final and _later(update, known):
        return update  # of another task: its producer's word may not have been kept
    return msgspec.structs.replace(
        update,
        task=update.task or known.task,
        enqueued_at=known.enqueued_at or update.enqueued_at,
        started_at=update.started_at or (known.started_at if update.is_final else None),
        progress=update.progress or (known.progress if update.state in FINAL or update.state == known.state else None),
        body=known.body if update.body is None else update.body,
        history=_continued(known, update),
    )


def _continued(known: Status, update: Status) -> list[Moment]:
    if (known.state, known.attempt) == (update.state, update.attempt):
        return known.history
    error = shorten(known.error or "", _MAX_ERROR) if known.state in ("retrying", "dead", "cancelled") else ""
    since = known.started_at if known.state == "running" and known.started_at else known.at
    return [*known.history, Moment(since, known.state, known.attempt, error)][-MOST_MOMENTS:]


def _later(one: Status, other: Status) -> bool:
    """Whether it was enqueued after the other; AMQP tells whole seconds."""
    return (one.enqueued_at or 0.0) >= (other.enqueued_at or 0.0) + 1.0


def placed(known: Status | None, row: Status | None) -> Status | None:
    """What was told of a task, set right by where the broker has it now (``row``; None: it has it no more).

    A row that is ``running`` is one that a worker holds. Whether it has begun, only the worker can tell.
    """
    if row is None:
        return known
    if row.state == "dead":
        return known if known is not None and known.state == "dead" else row
    if known is None or known.is_final:
        # Nothing, or of an older task with the same id, which the broker does not have any more.
        return msgspec.structs.replace(row, state="queued") if row.state == "running" else row
    if row.state in _WAITING and known.state == "running":
        return msgspec.structs.replace(row, task=row.task or known.task)
    if known.state == "delayed" and row.state in ("queued", "running"):
        return msgspec.structs.replace(known, state="queued", due=None)  # that it is due, nobody tells
    return known
