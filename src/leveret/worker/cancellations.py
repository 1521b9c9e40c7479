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
    """The latest requests, by task id. One may be read before its task, or together with it."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, CancelRequest] = OrderedDict()

    def note(self, request: CancelRequest) -> None:
        self._requests[request.id] = request
        if len(self._requests) > _MOST:
            self._requests.popitem(last=False)

    def __bool__(self) -> bool:
        return bool(self._requests)

    def cover(self, envelope: Envelope) -> bool:
        """Whether the task must not run."""
        request = self._requests.get(envelope.id)
        return request is not None and request.covers(envelope)
