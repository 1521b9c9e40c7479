"""Cancelling tasks, and asking workers what they do."""

from __future__ import annotations

import asyncio
import time
from itertools import islice
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.control.bus import CANCELLING, Signal
from leveret.brokers.rabbitmq.control.cancel_log import write
from leveret.brokers.rabbitmq.queues import QUESTION
from leveret.model import CancelRequest, cancelled_before

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.rabbitmq.control.bus import ControlBus
    from leveret.brokers.rabbitmq.queues import Publisher, Requester
    from leveret.brokers.rabbitmq.statuses import StatusLog
    from leveret.model import Status, WorkerReport

#: How many cancellations are written in one.
_CANCELLERS = 200
#: How long workers may take to hear of a cancellation and say that they run the task (seconds).
_HEARD = 0.3


class RabbitMQControl:
    """See `leveret.brokers.Control`."""

    def __init__(self, publisher: Publisher, requester: Requester, bus: ControlBus, statuses: StatusLog) -> None:
        self._publisher = publisher
        self._requester = requester
        self._bus = bus
        self._statuses = statuses
        self._writing = asyncio.Lock()
        #: Cancellations that are not written yet, by any key.
        self._unwritten: dict[object, CancelRequest] = {}

    async def cancel(self, id_: str) -> Status | None:
        mark = CancelRequest(id_, time.time())
        await self._requester.insist("cancelling", lambda: self._mark(mark))
        await asyncio.sleep(_HEARD)
        status = next(iter(await self._statuses.read([id_])), None)
        if status is None or status.is_final or status.state == "running":
            return status
        cancelled = cancelled_before(status, mark.at)
        await self._statuses.record([cancelled])
        return cancelled

    async def workers(self) -> Sequence[WorkerReport]:
        return await self._requester.insist("asking the workers", self._workers, QUESTION)

    async def _workers(self) -> list[WorkerReport]:
        return await self._bus.workers(await self._publisher.connection())

    async def _mark(self, mark: CancelRequest) -> None:
        """Write the mark, and tell the workers: in one with all that came while others were being written."""
        key = object()
        self._unwritten[key] = mark
        try:
            async with self._writing:
                if key not in self._unwritten:
                    return  # it went with another's
                batch = {key: mark, **dict(islice(self._unwritten.items(), _CANCELLERS))}
                connection = await self._publisher.connection()
                await write(self._publisher, connection, list(batch.values()))
                await self._bus.announce(connection, Signal(kind=CANCELLING))
                for one in batch:
                    self._unwritten.pop(one, None)
        finally:
            # Who gives up has nothing cancelled later.
            self._unwritten.pop(key, None)
