"""What the stream of statuses tells until now, read for all in this program who ask."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.statuses.streams import SILENCE, Batch, Place, Reading, new_sentinel, place_of
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable
from leveret.model import newer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from leveret.brokers.rabbitmq.statuses.status_stream import StatusStream
    from leveret.model import Status

T = TypeVar("T")

#: How many of the last messages are read for an overview; more only if those tell of too few tasks.
_LOOK_BACK = (100, 1_000)
_DOING = "reading what became of tasks"
_Asked: TypeAlias = "tuple[Sequence[str], asyncio.Future[tuple[dict[str, Status], int]]]"


class StatusReader:
    """Answers questions, those together that are asked while it reads for others."""

    def __init__(self, stream: StatusStream) -> None:
        self._stream = stream
        self._asked: list[_Asked] = []
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, ids: Sequence[str]) -> tuple[dict[str, Status], int]:
        """All that the stream tells of these tasks until now, and up to which offset. Raises BrokerError."""
        future: asyncio.Future[tuple[dict[str, Status], int]] = asyncio.get_running_loop().create_future()
        self._asked.append((ids, future))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.get_running_loop().create_task(self._answer())
        return await future

    async def recent(self, limit: int) -> dict[str, Status]:
        """What the last messages tell of the tasks that they are about. Raises BrokerError."""
        return await self._insist(partial(self._read_back, limit))

    async def close(self) -> None:
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)
        # Who asked while others were answered, or before the answering had begun.
        asked, self._asked = self._asked, []
        _fail(asked, BrokerUnavailable("the broker is closed"))

    async def _answer(self) -> None:
        """Read for all that asked, those together that asked while this was busy."""
        while self._asked:
            asked, self._asked = self._asked, []
            wanted = frozenset(id_ for ids, _ in asked for id_ in ids)
            try:
                answer = await self._insist(partial(self._read, wanted))
            except BaseException as error:
                _fail(asked, error)
                # aiormq cancels what waits on a connection that it gives up; whoever asked meanwhile still waits.
                if amqp.is_cancelled() or not isinstance(error, (Exception, asyncio.CancelledError)):
                    raise
            else:
                for _, future in asked:
                    if not future.done():
                        future.set_result(answer)

    async def _insist(self, read: Callable[[asyncio.Timeout], Awaitable[T]]) -> T:
        """Read, again and again while the broker is unavailable, for as long as the timeout; longer while news come."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._stream.timeout
        for pause in backoff():
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    return await read(limit)
            except TimeoutError as error:
                raise BrokerUnavailable(f"RabbitMQ did not answer within {self._stream.timeout:g} s") from error
            except (BrokerUnavailable, BrokerRefused) as error:
                if not self._stream.may_pass(error) or clock() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    async def _read(self, wanted: frozenset[str], limit: asyncio.Timeout) -> tuple[dict[str, Status], int]:
        known: dict[str, Status] = {}

        def take(_: int, batch: Batch) -> None:
            for update in batch.updates:
                if update.id in wanted:
                    known[update.id] = newer(known.get(update.id), update)

        place = place_of(list(wanted), time.time(), self._stream.keep)
        sentinel = new_sentinel()
        async with self._reading(place, take, sentinel, limit) as arrival:
            await self._stream.send(Batch(sentinel=sentinel))
            return known, await arrival()

    async def _read_back(self, count: int, limit: asyncio.Timeout) -> dict[str, Status]:
        known: dict[str, Status] = {}

        def take(_: int, batch: Batch) -> None:
            for update in batch.updates:
                known[update.id] = newer(known.get(update.id), update)

        sentinel = new_sentinel()
        async with self._reading("last", _ignore, sentinel, limit) as arrival:
            await self._stream.send(Batch(sentinel=sentinel))
            end = await arrival()
        for messages in _LOOK_BACK:
            known.clear()
            async with self._reading(max(0, end - messages), take, sentinel, limit) as arrival:
                await arrival()
            if len(known) >= count:
                break
        return known

    @asynccontextmanager
    async def _reading(
        self, place: Place, take: Callable[[int, Batch], None], sentinel: str, limit: asyncio.Timeout
    ) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
        """Read from that place on; gives what waits until the sentinel has come, for its offset."""
        line = await self._stream.open()

        def take_until_then(offset: int, batch: Batch) -> None:
            # What comes before the channel is closed is of another answer: a follower is told of it besides.
            if not came.done():
                take(offset, batch)
                _extend(limit)

        reading = Reading(line.connection, self._stream.name, take_until_then)
        came = reading.expect(sentinel)
        async with self._stream.reading(line, reading, place, _DOING):
            yield lambda: self._stream.hear(line, reading, came, _DOING)


def _extend(limit: asyncio.Timeout) -> None:
    """There is much to read, or this machine is slow: that is no silence."""
    patience, ends_at = asyncio.get_running_loop().time() + SILENCE, limit.when()
    if ends_at is not None and ends_at < patience and not limit.expired():
        limit.reschedule(patience)


def _fail(asked: Sequence[_Asked], error: BaseException) -> None:
    """Nobody must wait for an answer that does not come, whatever it was that went wrong."""
    if not isinstance(error, BrokerError):
        failure = BrokerUnavailable(f"reading was given up: {error!r}")
        failure.__cause__ = error
        error = failure
    for _, future in asked:
        if not future.done():
            future.set_exception(error)


def _ignore(offset: int, batch: Batch) -> None:
    """What is not wanted."""
