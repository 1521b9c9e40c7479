"""The values that travel: queues, envelopes, deliveries, outcomes. Frozen, no I/O."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias

import msgspec

from leveret.arguments import count
from leveret.durations import show
from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_QUEUE = "default"
Kind: TypeAlias = Literal["quorum", "classic"]
#: Priorities are 0 to this, the higher first.
MAX_PRIORITY = 9
#: Where a task without a priority stands among the others: RabbitMQ 4.3 decides so.
MIDDLE_PRIORITY = 4
#: A reason or a traceback longer than this is cut in the middle, so that a dead letter stays readable (characters).
MAX_TRACEBACK = 16_384
#: The last Unix time that is a date: the end of the year 9999.
LATEST = 253_402_300_799.0
#: What comes from elsewhere is decoded as these: whoever reads it can show, count and ask for it.
UnixTime: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=LATEST)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: AMQP's short string has 255 bytes; see also `is_name`.
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=255)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=100_000)]


class Queue(msgspec.Struct, frozen=True, kw_only=False):
    """A queue as the application wants it.

    ``max_length``: with that many ready tasks, ``enqueue`` raises ``QueueFull`` and nothing is dropped. On RabbitMQ
    the limit is the queue's own and approximate by the messages in flight.
    ``create=False``: the operator makes the queue; a missing one is an error instead of being declared.
    ``priorities=True``: its tasks have priorities, so a worker says at its start if the broker does not keep them.
    ``kind="classic"``: on RabbitMQ a classic queue with strict priorities, in place of a replicated quorum queue, which
    has them since 4.3 only. It is on one node, and does not count how often a task came back. No other broker minds it.
    """

    name: str
    max_length: int | None = None
    create: bool = True
    priorities: bool = False
    kind: Kind = "quorum"

    def __post_init__(self) -> None:
        if not _fits(self.name, MAX_QUEUE_NAME):
            raise ConfigurationError(
                f"queue name {self.name!r} must be 1 to {MAX_QUEUE_NAME} bytes long "
                "(an AMQP 0-9-1 short string, with room for the endings of dead-letter and delay queues)"
            )
        if self.name.startswith("amq."):
            raise ConfigurationError(f"queue name {self.name!r}: names that start with 'amq.' are the broker's own")
        if DELAY_INFIX in self.name and self.name.rpartition(DELAY_INFIX)[2].isdigit():
            raise ConfigurationError(f"queue name {self.name!r}: '{DELAY_INFIX}N' is the ending of delay queues")
        if self.name.endswith(DEAD_SUFFIX):
            raise ConfigurationError(f"queue name {self.name!r}: '{DEAD_SUFFIX}' is the ending of dead-letter queues")
        if self.name.endswith(PAUSED_SUFFIX):
            raise ConfigurationError(f"queue name {self.name!r}: '{PAUSED_SUFFIX}' is the ending of pause markers")
        if self.max_length is not None:
            length = count(f"queue {self.name!r}: max_length", self.max_length, none="no limit")
            msgspec.structs.force_setattr(self, "max_length", length)
        if self.kind not in ("quorum", "classic"):
            raise ConfigurationError(f"queue {self.name!r}: kind is {self.kind!r}, it must be 'quorum' or 'classic'")


DEAD_SUFFIX = ".dead"
PAUSED_SUFFIX = ".paused"
DELAY_INFIX = ".delay."
MAX_TASK_NAME = 255
MAX_ID = 255
MAX_QUEUE_NAME = 255 - len(DELAY_INFIX) - len("16777216000")


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """One task on its way. ``body`` is never decoded by a broker or by the worker's own process."""

    id: str
    queue: str
    #: The task's name; None when the message came without one and is for the queue's default task.
    task: str | None
    body: bytes
    content_type: str | None = "application/json"
    #: 1 for the first run. A run that ended because its worker stopped is not an attempt.
    attempt: int = 1
    #: Unix time, seconds; None when the producer did not say. Of a dead letter that was put back: when it was.
    enqueued_at: float | None = None
    #: What ended the attempt before this one.
    last_error: str | None = None
    #: Unix time before which it must not run; None: at once.
    due: float | None = None
    #: Unix time after which it must not start; it is dead then.
    expires_at: float | None = None
    #: The message's other headers, handed on as they came.
    headers: dict[str, Any] = {}
    #: The higher is taken first; None counts as `MIDDLE_PRIORITY`. 0 to 9, but a foreign message's may be any octet.
    priority: int | None = None
    #: How a foreign message's body is encoded: gzip, deflate; None: it is as it is.
    content_encoding: str | None = None


class Lease(Protocol):
    """The right to settle a delivery: the connection, or the consumer's lock."""

    @property
    def held(self) -> bool: ...


class Delivery(msgspec.Struct, frozen=True, eq=False):
    """An envelope handed to one consumer, until it is settled or its lease is lost."""

    envelope: Envelope
    lease: Lease
    #: The driver's fence: a channel's delivery tag, a row's delivery token.
    tag: int
    #: How often the broker had this back without an outcome: a worker died, stopped or lost its connection.
    returns: int = 0
    #: Why it cannot run, when the broker could not read the whole message; the envelope holds what could be read.
    defect: str = ""


class Succeeded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The task ran to its end."""

    #: What it returned, as JSON; None when that is not to be kept, or cannot be.
    result: bytes | None = None
    #: Why the result cannot be kept.
    problem: str = ""


class Retrying(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The attempt failed and is charged; the task goes to the end of its queue, ``delay`` seconds from now."""

    error: str
    traceback: str = ""
    delay: float = 0.0


class DeadLettered(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The task can't or shall not run again; it is kept with the reason."""

    reason: str
    traceback: str = ""


class Released(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Not run, or interrupted by a stop: handed back, uncharged, for another worker."""


class Cancelled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Somebody wanted it to end: it leaves its queue, and is no dead letter."""

    reason: str


Outcome: TypeAlias = Succeeded | Retrying | DeadLettered | Released | Cancelled
Settlement: TypeAlias = tuple[Delivery, Outcome]


def retried(envelope: Envelope, outcome: Retrying, now: float) -> Envelope:
    """The task for its next attempt."""
    return msgspec.structs.replace(
        envelope,
        attempt=envelope.attempt + 1,
        last_error=outcome.error,
        due=now + outcome.delay if outcome.delay else None,
    )


def revived(envelope: Envelope, now: float) -> Envelope:
    """A dead task for another life, enqueued now: its first attempt, at once, and it does not expire.

    Who cancelled it before, when it was dead or about to be, came too late: that must not end its new life.
    """
    return msgspec.structs.replace(envelope, attempt=1, enqueued_at=now, due=None, expires_at=None)


class DeadLetter(msgspec.Struct, frozen=True):
    """A task that will not run again by itself, and why."""

    envelope: Envelope
    reason: str
    traceback: str
    #: Unix time, seconds; None when whoever wrote it did not say.
    died_at: float | None
    #: The worker that gave it up, as `this_process` names it.
    worker: str | None = None

    def __repr__(self) -> str:
        """In one line: without the traceback, and with the beginning of the body."""
        envelope = self.envelope
        return brief(
            "DeadLetter",
            id=envelope.id,
            task=envelope.task,
            queue=envelope.queue,
            attempt=envelope.attempt,
            reason=self.reason,
            died_at=moment(self.died_at),
            worker=self.worker,
            body=envelope.body,
        )


class QueueStats(msgspec.Struct, frozen=True):
    """What is in a queue now."""

    name: str
    ready: int
    #: Handed to a consumer and not settled (RabbitMQ: unacknowledged).
    running: int
    dead: int
    consumers: int
    #: Not due yet.
    delayed: int = 0
    #: Consumers that are not Leveret's, or did not answer in time: what they run is not in ``running``.
    silent_consumers: int = 0
    #: Nothing of it is started until it is resumed.
    paused: bool = False
    #: RabbitMQ: queues of it that should be there and are not. Somebody deleted them, or a policy let them expire.
    missing: tuple[str, ...] = ()


class Removed(msgspec.Struct, frozen=True):
    """How many tasks left a queue for good when it was purged or deleted."""

    ready: int = 0
    delayed: int = 0
    dead: int = 0
    #: The queue was to be deleted, and stays, or comes again, since it has consumers.
    kept: bool = False


def _fits(name: str, limit: int) -> bool:
    """Whether a name is text of 1 to so many bytes."""
    try:
        return 0 < len(str.encode(name)) <= limit
    except (UnicodeEncodeError, TypeError):
        return False


def is_name(text: str) -> bool:
    """Whether a broker can be asked for a queue or a task of that name."""
    return _fits(text, 255)


def unix_time(value: object) -> float | None:
    """A Unix time from elsewhere (seconds); None for what is none: no number, negative, or after `LATEST`."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= LATEST:
        return float(value)
    return None


def printable(text: str) -> str:
    """The text with its lone surrogates (a file name that is no UTF-8) escaped, so that it can be stored and sent."""
    # The method itself: a subclass's of the same name may do anything.
    return str.encode(text, errors="backslashreplace").decode()


def check_task_name(name: str) -> None:
    """Raises ConfigurationError for a name that does not fit AMQP's ``type`` property (a short string)."""
    if not _fits(name, MAX_TASK_NAME):
        raise ConfigurationError(
            f"task name {name!r} must be text of 1 to {MAX_TASK_NAME} bytes (AMQP's property 'type')"
        )


def check_priority(priority: object) -> None:
    """Raises ConfigurationError for what is neither None nor a priority."""
    if priority is None or (type(priority) is int and 0 <= priority <= MAX_PRIORITY):
        return
    raise ConfigurationError(
        f"priority is {show(priority)}; it must be an integer from 0 to {MAX_PRIORITY}, the highest"
    )


def check_id(id_: object) -> None:
    """Raises ConfigurationError for an id that cannot be shown, or does not fit AMQP's property ``message_id``."""
    if not isinstance(id_, str) or not id_.isprintable() or not _fits(id_, MAX_ID):
        raise ConfigurationError(
            f"task id {id_!r} must be printable text of 1 to {MAX_ID} bytes (AMQP's property 'message_id')"
        )


def repeated(ids: Sequence[str]) -> list[str]:
    """The ids that are there more than once."""
    return [id_ for id_, count in Counter(ids).items() if count > 1]


def this_process() -> str:
    """What a worker is called where others read of it: its host and process id."""
    return f"{platform.node() or 'localhost'}:{os.getpid()}"


def new_id() -> str:
    """A task id: 32 hex digits, the first 12 of them the time in milliseconds, so that ids sort by age (as UUIDv7)."""
    return new_ids(1)[0]


def new_ids(count: int) -> list[str]:
    """That many, ascending: in an index those of tasks that are stored, and run, together stand together.

    The system is asked for chance once.
    """
    now = f"{time.time_ns() // 1_000_000:012x}"
    chance = os.urandom(10 * count).hex()
    return sorted([now + chance[start : start + 20] for start in range(0, 20 * count, 20)])


#: So much of a value is shown (characters).
_BRIEF = 100


def brief(name: str, **parts: Any) -> str:
    """What a value shows of itself to people: a line, without what is None, and with long values cut."""
    shown = [f"{key}={_cut(repr(value))}" for key, value in parts.items() if value is not None]
    return f"{name}({', '.join(shown)})"


def _cut(text: str) -> str:
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 4]}...{text[-1]}"


def moment(seconds: float | None) -> str | None:
    """Unix time for people, as it is here; in UTC where this zone has no such date."""
    if seconds is None:
        return None
    shown = datetime.fromtimestamp(seconds, UTC)
    with suppress(OverflowError, ValueError):
        shown = shown.astimezone()
    return shown.isoformat(" ", "seconds")


#: What a log record about a task says of it.
LOG_FIELDS = ("task_id", "task_name", "task_queue", "task_attempt")


def log_fields(envelope: Envelope) -> dict[str, Any]:
    """The ``extra`` of a log record about a task."""
    values = (envelope.id, envelope.task, envelope.queue, envelope.attempt)
    return dict(zip(LOG_FIELDS, values, strict=True))


def shorten(text: str, limit: int = MAX_TRACEBACK) -> str:
    """Cut the middle out of a long text; both ends of a traceback matter."""
    text = printable(text)
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
