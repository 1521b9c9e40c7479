"""Which tasks somebody has cancelled."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from leveret.model import Cancelled

if TYPE_CHECKING:
    from leveret.model import CancelRequest, Envelope

#: So many cancelled tasks are known at once.
_MOST = 100_000
NOT_RUN = Cancelled("cancelled before it ran")


class Cancellations:
    """The marks of late, by task id. A mark may be read before its task, or together with it."""

    def __init__(self) -> None:
        self._marks: OrderedDict[str, CancelRequest] = OrderedDict()

    def note(self, mark: CancelRequest) -> None:
        self._marks[mark.id] = mark
        if len(self._marks) > _MOST:
            self._marks.popitem(last=False)

    def __bool__(self) -> bool:
        return bool(self._marks)

    def cover(self, envelope: Envelope) -> bool:
        """Whether the task must not run."""
        mark = self._marks.get(envelope.id)
        return mark is not None and mark.covers(envelope)
