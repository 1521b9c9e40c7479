"""Cancelled tasks on RabbitMQ, where a message cannot be taken out of a queue: whoever gets it must know.

The marks are in a stream, which is made by the first cancellation. Workers read it from its beginning before they take
anything, and go on reading it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.declare import make_stream, message_count
from leveret.brokers.rabbitmq.streams import Batch, Reading, marks_declaration, new_sentinel, to_message
from leveret.errors import BrokerError
from leveret.listening import Counted
from leveret.status import FROM_THE_FUTURE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers.rabbitmq.declare import Notes
    from leveret.brokers.rabbitmq.publisher import Publisher
    from leveret.status import Mark

log = logging.getLogger("leveret.rabbitmq")

#: How long reading all marks may take before the worker begins without the rest (seconds).
_READ_TIMEOUT = 10.0
_LACK = "tasks that are cancelled before they run, run all the same"


async def write(publisher: Publisher, connection: amqp.Connection, mark: Mark) -> None:
    """Durable when it returns."""
    stream = marks_declaration()
    await make_stream(connection, stream)
    await publisher.publish([to_message(stream.name, Batch(marks=[mark]))])


class MarkBook:
    """What one consumer has read of them, over all its sessions. ``changed``: called when there are new ones."""

    def __init__(self, publisher: Publisher, notes: Notes, changed: Callable[[], None]) -> None:
        self._publisher = publisher
        self._notes = notes
        self._changed = changed
        self._new: list[Mark] = []
        self._offset: int | None = None
        self._reading: tuple[amqp.Line, Reading] | None = None
        self._beginning = asyncio.Lock()
        self._ignored = Counted(log, FROM_THE_FUTURE)

    def __bool__(self) -> bool:
        return bool(self._new)

    def take(self) -> Sequence[Mark]:
        """Those that are new since this was called last."""
        new, self._new = self._new, []
        return new

    async def read_on(self, line: amqp.Line) -> None:
        """Read all that are there, and from now on each that comes for as long as the line and the stream live."""
        async with self._beginning:
            if self._reading is not None:
                begun_on, reading = self._reading
                if begun_on is line and not reading.is_over:
                    return
                if reading.was_cancelled:
                    self._offset = None
                self._reading = None
            try:
                await self._begin(line)
            except amqp.ChannelAccessRefused as error:
                self._notes.tell_refusal(_LACK, error)
            except (amqp.ChannelNotFoundEntity, amqp.ChannelPreconditionFailed) as error:
                # It was deleted just now; or a node that came to the cluster later has no copy of it to read.
                log.warning("%s: %s", _LACK, error)

    async def _begin(self, line: amqp.Line) -> None:
        stream = marks_declaration().name
        if await message_count(line.connection, stream) is None:
            self._offset = None
            return
        reading = Reading(line.connection, stream, self._note)
        sentinel = new_sentinel()
        came = reading.expect(sentinel)
        await reading.begin("first" if self._offset is None else self._offset + 1)
        self._reading = line, reading
        # An alarm lets nobody publish, and only workers that take what is there can end it.
        with suppress(TimeoutError, BrokerError, amqp.LineLost):
            async with asyncio.timeout(_READ_TIMEOUT):
                await self._publisher.publish([to_message(stream, Batch(sentinel=sentinel))])
                await came
            return
        log.warning("the cancelled tasks could not all be read within %g s; some may run", _READ_TIMEOUT)

    def _note(self, offset: int, batch: Batch) -> None:
        self._offset = offset
        now = time.time()
        marks = [mark for mark in batch.marks if not mark.is_from_the_future(now)]
        if len(marks) < len(batch.marks):
            self._ignored.warn()
        if marks:
            self._new.extend(marks)
            self._changed()
