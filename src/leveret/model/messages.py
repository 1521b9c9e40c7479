"""The values that travel: queues, envelopes, deliveries, dead letters. Frozen, no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.arguments import count
from leveret.model.durations import show
from leveret.model.limits import LimitRule, Rate, checked_rule
from leveret.model.names import DEAD_SUFFIX, DELAY_INFIX, GATE_SUFFIX, MAX_QUEUE_NAME, PAUSED_SUFFIX, fits
from leveret.model.text import brief, moment

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULT_QUEUE = "default"
Kind: TypeAlias = Literal["quorum", "classic"]
#: Priorities are 0 to this, the higher first.
MAX_PRIORITY = 9
#: Where a task without a priority stands among the others: RabbitMQ 4.3 decides so.
MIDDLE_PRIORITY = 4


class Queue(msgspec.Struct, frozen=True, kw_only=False):
    """A queue as the application wants it.

    Args:
        name: The name: 1 to 237 bytes.
        max_length: The most tasks that are ready or wait for limits. With that many ``enqueue`` raises QueueFull, and
            nothing is dropped. On RabbitMQ the limit is the queue's own, and approximate by the messages in flight.
            None: no limit.
        create: False: the operator makes the queue; a missing one is an error instead of being declared.
        priorities: True: the queue's tasks have priorities, so a worker says at its start if the broker does not keep
            them.
        concurrency: The most tasks of the queue that are admitted and have not ended, over all workers. None: any
            number.
        rate: How many tasks of the queue may start in a time. None: any number.
        fair_by: The parameter whose argument says for whom a task is: these are served in turn, however many tasks each
            has. None: in order.
        kind: "classic": on RabbitMQ a classic queue with strict priorities, in place of a replicated quorum queue,
            which has them since 4.3 only. It is on one node, and does not count how often a task came back. No other
            broker minds it.

    Raises:
        ConfigurationError: The name is empty, too long or the broker's own, or a value is not what it must be.
    """

    name: str
    max_length: int | None = None
    create: bool = True
    priorities: bool = False
    kind: Kind = "quorum"
    concurrency: int | None = None
    rate: Rate | None = None
    fair_by: str | None = None

    @property
    def rule(self) -> LimitRule | None:
        """The limit of the whole queue; None: it has none."""
        return None if self.concurrency is None and self.rate is None else LimitRule(self.concurrency, self.rate)

    @property
    def is_limited(self) -> bool:
        """Whether its tasks wait for their turn, each of them."""
        return self.rule is not None or self.fair_by is not None

    def __post_init__(self) -> None:
        if not fits(self.name, MAX_QUEUE_NAME):
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
        if self.name.endswith(GATE_SUFFIX):
            raise ConfigurationError(
                f"queue name {self.name!r}: '{GATE_SUFFIX}' is the ending of queues where tasks wait for limits"
            )
        if self.max_length is not None:
            length = count(f"queue {self.name!r}: max_length", self.max_length, none="no limit")
            msgspec.structs.force_setattr(self, "max_length", length)
        checked_rule(f"queue {self.name!r}", self.concurrency, self.rate)
        fair_by: object = self.fair_by
        if fair_by is not None and (not isinstance(fair_by, str) or not fair_by):
            raise ConfigurationError(
                f"queue {self.name!r}: fair_by is {self.fair_by!r}; it must be the name of a parameter, as 'tenant'"
            )
        if self.kind not in ("quorum", "classic"):
            raise ConfigurationError(f"queue {self.name!r}: kind is {self.kind!r}, it must be 'quorum' or 'classic'")


class Envelope(msgspec.Struct, frozen=True, array_like=True, gc=False):
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

    def with_headers(self, headers: Mapping[str, str | float | bool | None], /) -> Envelope:
        """The same task with these headers besides, and in the place of others that have their names."""
        return msgspec.structs.replace(self, headers={**self.headers, **headers})


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


def check_priority(priority: object) -> None:
    """Raises ConfigurationError for what is neither None nor a priority."""
    if priority is None or (type(priority) is int and 0 <= priority <= MAX_PRIORITY):
        return
    raise ConfigurationError(
        f"priority is {show(priority)}; it must be an integer from 0 to {MAX_PRIORITY}, the highest"
    )


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
    #: Tasks that wait for a limit, or for their turn; they are not among the ``ready``.
    limited: int = 0
    #: RabbitMQ: queues of it that should be there and are not. Somebody deleted them, or a policy let them expire.
    missing: tuple[str, ...] = ()


class KeyHolder(msgspec.Struct, frozen=True):
    """A unique key that is taken, and the task that has it."""

    key: str
    id: str
    queue: str


class Removed(msgspec.Struct, frozen=True):
    """How many tasks left a queue for good when it was purged or deleted."""

    ready: int = 0
    delayed: int = 0
    dead: int = 0
    #: The queue was to be deleted, and stays, or comes again, since it has consumers.
    kept: bool = False


#: What a log record about a task says of it.
LOG_FIELDS = ("task_id", "task_name", "task_queue", "task_attempt")


def log_fields(envelope: Envelope) -> dict[str, Any]:
    """The ``extra`` of a log record about a task."""
    values = (envelope.id, envelope.task, envelope.queue, envelope.attempt)
    return dict(zip(LOG_FIELDS, values, strict=True))
