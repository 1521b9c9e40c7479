"""What becomes of tasks on RabbitMQ: told to one stream, and read from it by whoever waits."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues import make_stream
from leveret.brokers.rabbitmq.statuses.reader import StatusReader, lacks_permission
from leveret.brokers.rabbitmq.statuses.streams import Batch, events_declaration, to_message, was_just_made
from leveret.errors import BrokerUnavailable, LeveretError, QueueNotFound, TaskTooLarge
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
#: How long what was told may take to go out when the program ends (seconds).
SHUTDOWN_TIMEOUT = 2.0
#: After a missing permission nothing is stored for so long; then that is tried once more (seconds).
_REFUSED = 60.0


class StatusLog:
    """One program's way to and from the stream."""

    def __init__(self, hosts: Hosts, publisher: Publisher, *, keep: float, timeout: float) -> None:
        self._publisher = publisher
        self._keep = keep
        self._timeout = timeout
        self._stream = events_declaration(keep)
        self._is_made = False
        self._making = asyncio.Lock()
        #: For want of a permission nothing is stored until then (the loop's time).
        self._refused_until = float("-inf")
        self._was_refused = False
        self._waiting: list[Status] = []
        self._warnings = LimitedLog(log)
        #: The broker takes none now; what waits is tried again and again.
        self._is_behind = False
        #: The last try failed.
        self._takes_none = False
        #: Set when what waited is being sent, or the broker takes none.
        self._room = asyncio.Event()
        self._flushing: asyncio.Task[None] | None = None
        self._reader = StatusReader(hosts, self)

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

    async def tell(self, updates: Sequence[Status]) -> None:
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

    async def statuses(self, ids: Sequence[str]) -> Sequence[Status]:
        known: dict[str, Status] = {}
        missing = ids
        while missing:
            began = time.time()
            found, _ = await self._reader.ask(missing)
            known |= found
            # Its producer tells of a task a moment after it is stored, and an answer may take longer than a moment.
            unsent = {update.id for update in self._waiting} if len(known) < len(missing) else frozenset()
            missing = [id_ for id_ in missing if id_ not in known and (id_ in unsent or was_just_made(id_, began))]
            if missing:
                await asyncio.sleep(_GATHER)
        return [known[id_] for id_ in dict.fromkeys(ids) if id_ in known]

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        return self._reader.follow(ids)

    def watch(self) -> Following[Watch]:
        return self._reader.watch()

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
        await self._reader.close()
        self._warnings.flush()

    async def send(self, batch: Batch) -> None:
        """Raises BrokerError."""
        for _ in range(2):
            async with self._making:  # once for all that are told at first
                if not self._is_made:
                    await self._make()
            try:
                return await self._publisher.publish([to_message(self._stream.name, batch)])
            except QueueNotFound:
                self._is_made = False
        raise BrokerUnavailable(f"the stream {self._stream.name!r} is deleted again and again")

    async def make(self) -> None:
        """Have the stream be there. Raises BrokerError."""
        async with self._making:
            await self._make()

    async def _make(self) -> None:
        doing = f"making the stream {self._stream.name!r}"
        try:
            async with asyncio.timeout(self._timeout):
                await amqp.told(make_stream(await self._publisher.connection(), self._stream))
        except asyncio.CancelledError as error:
            if amqp.is_cancelled():
                raise
            raise BrokerUnavailable(f"{doing}: the connection to RabbitMQ was lost") from error
        except TimeoutError as error:
            raise BrokerUnavailable(f"{doing}: RabbitMQ did not answer") from error
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error
        self._is_made = True

    @property
    def stream(self) -> str:
        return self._stream.name

    @property
    def keep(self) -> float:
        return self._keep

    @property
    def timeout(self) -> float:
        return self._timeout

    async def _publish(self, updates: Sequence[Status]) -> None:
        for part in _parts(updates):
            await self._send(part)
        self._was_refused = self._takes_none = False

    async def _send(self, updates: list[Status]) -> None:
        """What the server finds too large goes without what makes it so: the others, and the task, must not wait."""
        try:
            await self.send(Batch(updates=updates))
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
        raise AssertionError("backoff() never ends")


def _is_late(update: Status, now: float) -> bool:
    """Whether this is a new task that whoever asks for it may find unknown, and not wait: see `StatusLog.statuses`."""
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
