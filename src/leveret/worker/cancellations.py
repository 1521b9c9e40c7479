"""What a worker knows of tasks that somebody has cancelled."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from leveret.model import Cancelled, Succeeded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from leveret.model import CancelRequest, Delivery, Outcome

#: So many cancelled tasks are known at once.
_MOST = 100_000
NOT_RUN = Cancelled("cancelled before it ran")
_ENDED = Cancelled("cancelled while it ran")


class Cancellations:
    """Marks, and the jobs that run and were told to end."""

    def __init__(self) -> None:
        self._marks: OrderedDict[str, CancelRequest] = OrderedDict()
        self._ending: set[int] = set()

    def note(self, mark: CancelRequest, jobs: Mapping[int, Delivery]) -> Sequence[int]:
        """Remember a mark; the jobs that are to be told of it."""
        self._marks[mark.id] = mark
        if len(self._marks) > _MOST:
            self._marks.popitem(last=False)
        keys = [key for key, delivery in jobs.items() if delivery.envelope.id == mark.id and self.covers(delivery)]
        told = [key for key in keys if key not in self._ending]
        self._ending.update(told)
        return told

    def covers(self, delivery: Delivery) -> bool:
        """Whether the delivery's task must not run."""
        mark = self._marks.get(delivery.envelope.id)
        return mark is not None and mark.covers(delivery.envelope)

    def judged(self, key: int, outcome: Outcome) -> Outcome:
        """The outcome of a job that has ended: one that was told to end, and did not succeed in spite of it, did so."""
        if key not in self._ending:
            return outcome
        self._ending.discard(key)
        return outcome if isinstance(outcome, (Succeeded, Cancelled)) else _ENDED
