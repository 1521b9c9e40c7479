"""How a run ended, and what becomes of the task then."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.model.limits import limit_refs, queue_limit
from leveret.model.messages import Delivery, Envelope

if TYPE_CHECKING:
    from collections.abc import Iterable


class Succeeded(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The task ran to its end."""

    #: What it returned, as JSON; None when that is not to be kept, or cannot be.
    result: bytes | None = None
    #: Why the result cannot be kept.
    problem: str = ""
    #: What it sets going: durable before its delivery is gone.
    follow_ups: tuple[Envelope, ...] = ()


class Retrying(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The attempt failed and is charged; the task goes to the end of its queue, ``delay`` seconds from now."""

    error: str
    traceback: str = ""
    delay: float = 0.0


class DeadLettered(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The task can't or shall not run again; it is kept with the reason."""

    reason: str
    traceback: str = ""


class Released(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Not run, or interrupted by a stop: handed back, uncharged, for another worker."""


class Cancelled(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Somebody wanted it to end: it leaves its queue, and is no dead letter."""

    reason: str


class PutOff(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Uncharged: the task waits for its limits again, and one of them lets nothing of its key go for a while."""

    limit: str
    key: str
    #: How long (seconds).
    delay: float


def following(settlements: Iterable[Settlement]) -> list[Envelope]:
    """What outcomes set going."""
    return [one for _, outcome in settlements if isinstance(outcome, Succeeded) for one in outcome.follow_ups]


Outcome: TypeAlias = Succeeded | Retrying | DeadLettered | Released | Cancelled | PutOff
Settlement: TypeAlias = tuple[Delivery, Outcome]


def retried(envelope: Envelope, outcome: Retrying, now: float) -> Envelope:
    """The task for its next attempt."""
    return msgspec.structs.replace(
        envelope,
        attempt=envelope.attempt + 1,
        last_error=outcome.error,
        due=now + outcome.delay if outcome.delay else None,
    )


def put_off(envelope: Envelope, outcome: PutOff, now: float, *, rests: bool) -> Envelope:
    """The task as it waits again. ``rests``: the limit is there, and its key rests; else the task waits by itself."""
    own = [*limit_refs(envelope.headers), (queue_limit(envelope.queue), "")]
    if rests and (outcome.limit, outcome.key) in own:
        return envelope
    return msgspec.structs.replace(envelope, due=now + outcome.delay)


def revived(envelope: Envelope, now: float) -> Envelope:
    """A dead task for another life, enqueued now: its first attempt, at once, and it does not expire.

    Who cancelled it before, when it was dead or about to be, came too late: that must not end its new life.
    """
    return msgspec.structs.replace(envelope, attempt=1, enqueued_at=now, due=None, expires_at=None)
