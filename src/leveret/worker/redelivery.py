"""Deliveries that come again after their connection was lost: what ran is not run a second time.

While an outcome is recorded, its job is in the table (`Jobs.settling_as`). It is kept here for a while after that, as
an acknowledgment may be lost with its connection and nobody is told.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from leveret.model import Released
from leveret.worker.job import attempt_of

if TYPE_CHECKING:
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

    def settled(self, job: Job, *, is_lost: bool) -> Redelivery | None:
        """A job's outcome is recorded, or its lease was lost; its delivery that came again meanwhile, if it did."""
        if isinstance(job.outcome, Released):
            return None
        # What is recorded is only acknowledged again: a second copy would run, or be dead, beside the first.
        outcome = job.outcome if is_lost else None
        self._remember(job, None if is_lost else job.delivery.lease, outcome)
        return None if job.again is None else Redelivery(job.again, outcome)

    def acknowledged(self, job: Job) -> None:
        """A job is acknowledged, and runs only then."""
        self._remember(job, job.delivery.lease, None)

    def find(self, delivery: Delivery) -> Redelivery | None:
        """What is to be done about a delivery that came again; None: it is to be run."""
        ended = self._ended.get(attempt_of(delivery))
        if ended is None or time.monotonic() > ended.until or (ended.lease is not None and ended.lease.held):
            return None
        return Redelivery(delivery, ended.outcome)

    def _remember(self, job: Job, lease: Lease | None, outcome: Outcome | None) -> None:
        key = job.attempt or attempt_of(job.delivery)
        self._ended[key] = _Ended(lease, outcome, time.monotonic() + _REMEMBERED)
        if len(self._ended) > _MOST_REMEMBERED:
            self._ended.popitem(last=False)
