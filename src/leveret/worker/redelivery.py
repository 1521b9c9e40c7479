"""Deliveries that come again after their connection was lost: what ran is not run a second time.

From its end on, a run's outcome is kept here: while it is recorded, and for a while after that, as an acknowledgment
may be lost with its connection and nobody is told.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from leveret.model import Released

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.model import Delivery, Lease, Outcome, Settlement

Attempt: TypeAlias = tuple[str, str, int, float | None, int]

#: How long, and how many, outcomes wait for their task to come again (seconds).
_REMEMBERED = 600.0
_MOST_REMEMBERED = 1_000


def attempt(delivery: Delivery) -> Attempt:
    """What tells one attempt at a task from every other: an id may be used again, by a dead letter put back, say."""
    envelope = delivery.envelope
    # The content too: a foreign producer may give all its messages one id, and none of them may pass for another.
    content = hash((envelope.task, envelope.body, delivery.defect))
    return envelope.queue, envelope.id, envelope.attempt, envelope.enqueued_at, content


class Redelivery(NamedTuple):
    """A delivery that came again, and what is to be recorded of it; None: that is done, it is only acknowledged."""

    delivery: Delivery
    outcome: Outcome | None


class _Recording(NamedTuple):
    """An outcome that is on its way to the broker, and the deliveries that came again meanwhile."""

    lease: Lease
    again: list[Delivery]


class _Ended(NamedTuple):
    """``lease``: what it was recorded by. ``outcome``: what is still to be recorded, after the lease was lost."""

    lease: Lease | None
    outcome: Outcome | None
    until: float


class RedeliveryCache:
    """The outcomes of late, by attempt."""

    def __init__(self) -> None:
        self._recording: dict[Attempt, _Recording] = {}
        self._ended: OrderedDict[Attempt, _Ended] = OrderedDict()

    def begin(self, settlements: Sequence[Settlement]) -> Sequence[Attempt]:
        """Runs have ended, and their outcomes are being recorded; `end` wants what this returns."""
        attempts = [attempt(delivery) for delivery, _ in settlements]
        for key, (delivery, outcome) in zip(attempts, settlements, strict=True):
            if not isinstance(outcome, Released):
                self._recording[key] = _Recording(delivery.lease, [])
        return attempts

    def end(
        self, attempts: Sequence[Attempt], settlements: Sequence[Settlement], lost: frozenset[str]
    ) -> Sequence[Redelivery]:
        """They are recorded, but for the ids whose lease was lost; what came again meanwhile."""
        until = time.monotonic() + _REMEMBERED
        repeats: list[Redelivery] = []
        for key, (delivery, outcome) in zip(attempts, settlements, strict=True):
            if isinstance(outcome, Released):
                continue
            # What is recorded is only acknowledged again: a second copy would run, or be dead, beside the first.
            is_lost = delivery.envelope.id in lost
            self._remember(key, _Ended(None, outcome, until) if is_lost else _Ended(delivery.lease, None, until))
            recording = self._recording.pop(key, None)
            if recording is not None and recording.again:
                repeats.append(Redelivery(recording.again[-1], self._ended[key].outcome))
        return repeats

    def acknowledged(self, delivery: Delivery) -> None:
        """It is acknowledged, and runs only then."""
        self._remember(attempt(delivery), _Ended(delivery.lease, None, time.monotonic() + _REMEMBERED))

    def waits(self, delivery: Delivery) -> bool:
        """Whether it came again while its outcome is being recorded: `end` returns it then."""
        recording = self._recording.get(attempt(delivery))
        if recording is None or recording.lease.held:
            return False
        recording.again.append(delivery)
        return True

    def find(self, delivery: Delivery) -> Redelivery | None:
        """What is to be done about a delivery that came again; None: it is to be run."""
        ended = self._ended.get(attempt(delivery))
        if ended is None or time.monotonic() > ended.until or (ended.lease is not None and ended.lease.held):
            return None
        return Redelivery(delivery, ended.outcome)

    def _remember(self, key: Attempt, ended: _Ended) -> None:
        self._ended[key] = ended
        if len(self._ended) > _MOST_REMEMBERED:
            self._ended.popitem(last=False)
