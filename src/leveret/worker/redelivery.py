"""Deliveries that come again after their connection was lost: what ran is not run a second time.

While an outcome is recorded, its job is in the table (`Jobs.settling_as`). It is kept here for a while after that, as
an acknowledgment may be lost with its connection and nobody is told.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from leveret.worker.job import attempt_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.model import Delivery, Lease, Outcome
    from leveret.worker.job import Attempt, Job

#: How long, and how many, outcomes wait for their task to come again (seconds).
_REMEMBERED = 600.0
_MOST_REMEMBERED = 1_000


class Redelivery(NamedTuple):
    """A delivery that came again, and what is to be recorded of it; None: that is done, it is only acknowledged."""

    delivery: Delivery
    outcome: Outcome | None


class _Ended(NamedTuple):
    """``lease``: what it was recorded by. ``outcome``: what is still to be recorded, after the lease was lost."""

    lease: Lease | None
    outcome: Outcome | None
    until: float


class RedeliveryCache:
    """The outcomes of late, by attempt."""

    def __init__(self) -> None:
        self._ended: OrderedDict[Attempt, _Ended] = OrderedDict()

    def settled(self, jobs: Iterable[Job], lost: frozenset[str]) -> Sequence[Redelivery]:
        """Outcomes are recorded, but for the ids whose lease was lost; the deliveries that came again meanwhile."""
        until = time.monotonic() + _REMEMBERED
        again: list[Redelivery] = []
        for job in jobs:
            if job.attempt is None:
                continue  # it was handed back
            # What is recorded is only acknowledged again: a second copy would run, or be dead, beside the first.
            is_lost = job.delivery.envelope.id in lost
            ended = _Ended(None, job.outcome, until) if is_lost else _Ended(job.delivery.lease, None, until)
            self._remember(job.attempt, ended)
            if job.again is not None:
                again.append(Redelivery(job.again, ended.outcome))
        return again

    def acknowledged(self, delivery: Delivery) -> None:
        """It is acknowledged, and runs only then."""
        self._remember(attempt_of(delivery), _Ended(delivery.lease, None, time.monotonic() + _REMEMBERED))

    def find(self, delivery: Delivery) -> Redelivery | None:
        """What is to be done about a delivery that came again; None: it is to be run."""
        ended = self._ended.get(attempt_of(delivery))
        if ended is None or time.monotonic() > ended.until or (ended.lease is not None and ended.lease.held):
            return None
        return Redelivery(delivery, ended.outcome)

    def _remember(self, key: Attempt, ended: _Ended) -> None:
        self._ended[key] = ended
        if len(self._ended) > _MOST_REMEMBERED:
            self._ended.popitem(last=False)
