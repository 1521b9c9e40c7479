"""What becomes of tasks on RabbitMQ: told to one stream, and read from it by whoever waits."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.statuses.follower import StatusFollower
from leveret.brokers.rabbitmq.statuses.reader import StatusReader
from leveret.brokers.rabbitmq.statuses.recent import Recent
from leveret.brokers.rabbitmq.statuses.status_stream import StatusStream, lacks_permission
from leveret.brokers.rabbitmq.statuses.streams import Batch, was_just_made
from leveret.errors import BrokerError, LeveretError, TaskTooLarge
from leveret.model import NO_RESULT
from leveret.model.printable import in_line
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.feeds import Feed, Following, Watch
    from leveret.brokers.rabbitmq.amqp import Hosts
    from leveret.brokers.rabbitmq.queues import Publisher
    from leveret.model import Status

log = logging.getLogger("leveret.rabbitmq")

#: What is told within this time goes out as one message (seconds).
_GATHER = 0.02
#: How long after it was made a task may be stored and still be told of a moment later (seconds): less than `YOUNG`.
_PROMPT = 0.5
#: How long an outcome may wait for its update; then the update follows when it can (seconds).
_PATIENCE = 2.0
#: Updates in one message, and those that wait. Then whoever tells waits too; while the broker takes none, the oldest
#: are dropped.
_MOST_IN_ONE = 500
_MOST_WAITING = 20_000
#: About so many bytes of results in one message.
_MOST_BYTES = 256 * 1024
#: Whoever asks again within this time reads on in between (seconds).
_OFTEN = 5.0
#: How long what was told may take to go out when the program ends (seconds).
SHUTDOWN_TIMEOUT = 2.0
#: After a missing permission nothing is stored for so long; then that is tried once more (seconds).
_REFUSED = 60.0


class StatusLog:
    """See `leveret.brokers.Statuses`: one program's way to and from the stream."""

    def __init__(self, hosts: Hosts, publisher: Publisher, *, keep: float, timeout: float) -> None:
        self._stream = StatusStream(hosts, publisher, keep=keep, timeout=timeout)
        self._reader = StatusReader(self._stream)
        #: Whoever stores tasks here notes them there: then what becomes of them costs little to follow.
        self.lately = Recent()
        self._follower = StatusFollower(self._stream, self._reader, self.lately)
        #: For want of a permission nothing is stored until then (the loop's time).
        self._refused_until = float("-inf")
        self._was_refused = False
        #: When it was asked what became of tasks (the loop's time).
        self._asked_at = float("-inf")
        self._waiting: list[Status] = []
        self._warnings = LimitedLog(log)
        #: The broker takes none now; what waits is tried again and again.
        self._is_behind = False
        #: The last try failed.
        self._takes_none = False
        #: Set when what waited is being sent, or the broker takes none.
        self._room = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None

    async def record(self, updates: Sequence[Status]) -> None:
        """Durable when it returns, or if the broker takes nothing now: soon; without the permission to write: never."""
        if not updates or self._is_refused():
            return
        if self._is_behind:
            self._hold(updates)  # one that waits is enough: the others' outcomes must not be late for it
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._publish(updates)
        except (LeveretError, TimeoutError) as error:
            if lacks_permission(error):
                self._give_up(error)
                return
            if not self._is_behind:  # thousands may wait at the same time, and one says it for all
                log.warning("results and statuses cannot be stored now: %s", str(error) or "no answer")
            self._is_behind = self._takes_none = True
            self._room.set()
            self._hold(updates)

    async def notify(self, updates: Sequence[Status]) -> None:
        """Sent in a moment, together with what else is told until then; a new task that nobody waits for, at once."""
        while not self._is_refused() and len(self._waiting) >= _MOST_WAITING and not self._takes_none:
            self._room.clear()
            await self._room.wait()
        if self._is_refused():
            return
        self._hold(updates)
        flushing = self._flushing
        if flushing is None or self._is_behind or len(updates) > _MOST_IN_ONE:
            return
        if any(_is_late(update, time.time()) for update in updates):
            # With those of the others: a burst on a new queue is late as a whole.
            await asyncio.wait([flushing], timeout=_PATIENCE)

    async def read(self, ids: Sequence[str]) -> Sequence[Status]:
        known: dict[str, Status] = {}
        missing = list(dict.fromkeys(ids))
        self._note_asking()
        while missing:
            began = time.time()
            known |= await self._find(missing)
            # Its producer tells of a task a moment after it is stored, and an answer may take longer than a moment.
            unsent = {update.id for update in self._waiting} if len(known) < len(missing) else frozenset()
            missing = [id_ for id_ in missing if id_ not in known and (id_ in unsent or was_just_made(id_, began))]
            if missing:
                await asyncio.sleep(_GATHER)
        return [known[id_] for id_ in dict.fromkeys(ids) if id_ in known]

    async def _find(self, ids: Sequence[str]) -> dict[str, Status]:
        """What the stream tells of them until now."""
        if self.lately.known(ids) is not None:
            with suppress(BrokerError):
                await self._follower.hear_all()
                if (known := self.lately.known(ids)) is not None:
                    return {status.id: status for status in known}
        mark = self.lately.mark
        found, offset = await self._reader.ask(ids)
        self.lately.note_found(found.values(), offset, mark)
        return found

    def _note_asking(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._asked_at < _OFTEN:
            self._follower.stay()
        self._asked_at = now

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        return self._follower.follow(ids)

    def watch(self) -> Following[Watch]:
        return self._follower.watch()

    async def recent(self, limit: int) -> Sequence[Status]:
        known = await self._reader.recent(limit)
        return sorted(known.values(), key=lambda status: status.at, reverse=True)[:limit]

    async def close(self) -> None:
        self._takes_none = True
        self._room.set()
        if self._flushing is not None:
            await asyncio.wait([self._flushing], timeout=SHUTDOWN_TIMEOUT)
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._follower.close()
        await self._reader.close()
        await self._stream.close()
        self._warnings.flush()

    async def _publish(self, updates: Sequence[Status]) -> None:
        for part in _parts(updates):
            await self._send(part)
        self._was_refused = self._takes_none = False

    async def _send(self, updates: list[Status]) -> None:
        """What the server finds too large goes without what makes it so: the others, and the task, must not wait."""
        try:
            await self._stream.send(Batch(updates=updates))
        except TaskTooLarge:
            if len(updates) > 1:
                for update in updates:
                    await self._send([update])
            elif (smaller := _smaller(updates[0], self._warnings)) is not None:
                await self._send([smaller])
            else:
                self._warnings.warning(
                    "a status of task %s is lost: RabbitMQ's max_message_size is too small", in_line(updates[0].id)
                )

    def _is_refused(self) -> bool:
        return asyncio.get_running_loop().time() < self._refused_until

    def _give_up(self, error: Exception) -> None:
        self._refused_until = asyncio.get_running_loop().time() + _REFUSED
        if not self._was_refused:
            log.warning("no results and statuses are stored, for want of a permission: %s", error)
        self._was_refused = True

    def _hold(self, updates: Sequence[Status]) -> None:
        self._waiting.extend(updates)
        if self._takes_none and len(self._waiting) > _MOST_WAITING:
            self._warnings.warning("%d results and statuses are lost", len(self._waiting) - _MOST_WAITING)
            del self._waiting[:-_MOST_WAITING]
        if self._waiting and (self._flushing is None or self._flushing.done()):
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(_GATHER)
        for pause in backoff():
            if not self._waiting:
                if self._is_behind:
                    log.info("results and statuses are stored again")
                self._is_behind = False
                return
            updates, self._waiting = self._waiting, []
            self._room.set()
            try:
                await self._publish(updates)
            except LeveretError as error:
                if lacks_permission(error):
                    self._give_up(error)
                    return
                if not self._is_behind:
                    log.warning("results and statuses cannot be stored now: %s", error)
                self._waiting[:0] = updates
                self._is_behind = self._takes_none = True
                self._room.set()
                await asyncio.sleep(pause)


def _is_late(update: Status, now: float) -> bool:
    """Whether this is a new task that whoever asks for it may find unknown, and not wait: see `StatusLog.read`."""
    return update.state in {"queued", "delayed"} and not was_just_made(update.id, now, _PROMPT)


def _parts(updates: Sequence[Status]) -> list[list[Status]]:
    """As many messages as they need."""
    parts: list[list[Status]] = [[]]
    size = 0
    for update in updates:
        weight = len(update.traceback) + len(bytes(update.encoded_result)) + len(update.body or b"")
        if parts[-1] and (len(parts[-1]) >= _MOST_IN_ONE or size + weight > _MOST_BYTES):
            parts.append([])
            size = 0
        parts[-1].append(update)
        size += weight
    return parts


def _smaller(update: Status, warnings: LimitedLog) -> Status | None:
    """The update without what is largest in it; None: it has no such thing."""
    if update.has_result:
        problem = (
            f"the result of task {update.task!r} is {len(bytes(update.encoded_result))} bytes, over this RabbitMQ's "
            "max_message_size; store it elsewhere and return a reference"
        )
        warnings.warning("task %s succeeded, and its result is not kept: %s", in_line(update.id), problem)
        return msgspec.structs.replace(update, encoded_result=NO_RESULT, problem=problem)
    if update.traceback or update.body:
        return msgspec.structs.replace(update, traceback="", body=None)
    return None
