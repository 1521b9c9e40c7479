"""Cancelled tasks on RabbitMQ, where a message cannot be taken out of a queue: whoever gets it must know.

The marks are in a stream, which is made by the first cancellation. Workers read it from its beginning before they take
anything, and go on reading it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.control.bus import CANCELLING, Signal
from leveret.brokers.rabbitmq.queues import make_stream, message_count
from leveret.brokers.rabbitmq.statuses import (
    SILENCE,
    Batch,
    Reading,
    last_offset,
    marks_declaration,
    new_sentinel,
    read,
    to_message,
)
from leveret.errors import BrokerError
from leveret.model import FROM_THE_FUTURE, CancelRequest, cancelled_before
from leveret.observe import Counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers.rabbitmq.control.bus import ControlBus
    from leveret.brokers.rabbitmq.coordination import Claims
    from leveret.brokers.rabbitmq.queues import OnceLogger, Publisher, Requester
    from leveret.brokers.rabbitmq.statuses import Place, StatusLog
    from leveret.model import Status, WorkerReport

log = logging.getLogger("leveret.rabbitmq")

#: How long reading all marks may take before the worker begins without the rest (seconds).
_READ_TIMEOUT = 10.0
#: How many cancellations are written in one.
_CANCELLERS = 200
#: How long workers may take to hear of a cancellation and say that they run the task (seconds).
_HEARD = 0.3
#: How often it is looked in that time whether what is there has come.
_LOOKS = 50
_LACK = "tasks that are cancelled before they run, run all the same"


class RabbitMQControl:
    """See `leveret.brokers.Control`."""

    def __init__(
        self, publisher: Publisher, requester: Requester, bus: ControlBus, statuses: StatusLog, claims: Claims
    ) -> None:
        self._publisher = publisher
        self._requester = requester
        self._bus = bus
        self._statuses = statuses
        self._claims = claims
        self._writing = asyncio.Lock()
        #: Cancellations that are not written yet, by any key.
        self._unwritten: dict[object, CancelRequest] = {}

    async def cancel(self, id_: str) -> Status | None:
        mark = CancelRequest(id_, time.time())
        await self._requester.ask("cancelling", lambda: self._mark(mark), patience=None)
        await asyncio.sleep(_HEARD)
        status = next(iter(await self._statuses.read([id_])), None)
        if status is None or status.is_final or status.state == "running":
            return status
        cancelled = cancelled_before(status, mark.at)
        await self._claims.cancelled(id_)
        await self._statuses.record([cancelled])
        return cancelled

    async def workers(self) -> Sequence[WorkerReport]:
        return await self._requester.ask("asking the workers", self._workers)

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
                stream = marks_declaration()
                await make_stream(connection, stream)
                await self._publisher.publish([to_message(stream.name, Batch(marks=list(batch.values())))])
                await self._bus.announce(connection, Signal(kind=CANCELLING))
                for one in batch:
                    self._unwritten.pop(one, None)
        finally:
            # Who gives up has nothing cancelled later.
            self._unwritten.pop(key, None)


class CancelLog:
    """Reads them for one consumer, over all its sessions. ``heard``: called with those that are new."""

    def __init__(
        self, publisher: Publisher, notes: OnceLogger, heard: Callable[[Sequence[CancelRequest]], None]
    ) -> None:
        self._publisher = publisher
        self._notes = notes
        self._heard = heard
        self._offset: int | None = None
        self._reading: tuple[amqp.Link, Reading] | None = None
        self._beginning = asyncio.Lock()
        #: The stream could not be read when that was tried last.
        self._lacks = False
        self._ignored = Counted(log, FROM_THE_FUTURE)

    async def read_on(self, line: amqp.Link) -> None:
        """Make sure that all that are there are read, and each that comes for as long as the line and the stream live.

        To be called again now and then, and when there is a new one: a reading may be over, or deaf.
        """
        async with self._beginning:
            if await self._reads_on(line):
                return
            self._reading = None
            try:
                await self._begin(line)
            except amqp.ChannelAccessRefused as error:
                self._notes.warn_of_refusal(_LACK, error)
            except (amqp.ChannelNotFoundEntity, amqp.ChannelPreconditionFailed) as error:
                # It was deleted just now, or has no leader yet; or a node that came to the cluster later has no copy of
                # it to read. That is tried again when this is called again.
                if not self._lacks:
                    log.warning("%s: %s", _LACK, error)
                self._lacks = True
            else:
                self._lacks = False

    async def _reads_on(self, line: amqp.Link) -> bool:
        if self._reading is None:
            return False
        begun_on, reading = self._reading
        if reading.was_cancelled:
            self._offset = None
        if begun_on is not line or reading.is_over:
            return False
        with suppress(amqp.ChannelNotFoundEntity, amqp.ChannelPreconditionFailed):
            end = await last_offset(line.connection, marks_declaration().name)
            if end is None or await self._comes_to(end):
                return True
            log.warning("RabbitMQ has stored cancellations that it does not tell this worker of; reading them anew")
        await reading.end()
        return False

    async def _comes_to(self, end: int) -> bool:
        """Whether what is there has come, or comes in a moment."""
        for _ in range(_LOOKS):
            if self._offset is not None and self._offset >= end:
                return True
            await asyncio.sleep(SILENCE / _LOOKS)
        return False

    async def _begin(self, line: amqp.Link) -> None:
        stream = marks_declaration().name
        if await message_count(line.connection, stream) is None:
            self._offset = None
            return
        reading = Reading(line, stream, self._note)
        sentinel = new_sentinel()
        came = reading.expect(sentinel)
        place: Place = "first" if self._offset is None else self._offset + 1
        await reading.begin(place)
        self._reading = line, reading
        # An alarm lets nobody publish, and only workers that take what is there can end it.
        with suppress(TimeoutError, BrokerError, amqp.LinkLost):
            async with asyncio.timeout(_READ_TIMEOUT):
                await self._publisher.publish([to_message(stream, Batch(sentinel=sentinel))])
                if isinstance(place, int) and await came < place:
                    self._offset = None  # it is another stream by now, and is read from its beginning the next time
                    await reading.end()
                await came
            return
        log.warning("the cancelled tasks could not all be read within %g s; some may run", _READ_TIMEOUT)

    def _note(self, offset: int, body: bytes) -> None:
        self._offset = offset
        batch = read(body)
        if batch is None:
            return
        now = time.time()
        marks = [mark for mark in batch.marks if not mark.is_from_the_future(now)]
        if len(marks) < len(batch.marks):
            self._ignored.warn()
        if marks:
            self._heard(marks)
