"""What the stream of statuses tells until now, read for all in this program who ask."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.statuses.streams import (
    SILENCE,
    Batch,
    Place,
    Reading,
    Wanted,
    new_sentinel,
    place_of,
    read,
    tells_its_time,
)
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable
from leveret.model import MOST_SKEW, newer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence

    from leveret.brokers.rabbitmq.statuses.status_stream import StatusStream
    from leveret.model import Status

T = TypeVar("T")

#: How many of the last messages are read for an overview; more only if those tell of too few tasks.
_LOOK_BACK = (100, 1_000)
#: As far as clocks are apart as a rule (seconds). Where a task does not begin within it, more is read.
_USUAL_SKEW = 1.0
_DOING = "reading what became of tasks"


class _Question(NamedTuple):
    ids: Sequence[str]
    #: Whether all until now is to be read, though it is known how the tasks have ended.
    to_the_end: bool
    answer: asyncio.Future[tuple[dict[str, Status], int]]


class StatusReader:
    """Answers questions, those together that are asked while it reads for others."""

    def __init__(self, stream: StatusStream) -> None:
        self._stream = stream
        self._asked: list[_Question] = []
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, ids: Sequence[str], *, to_the_end: bool = False) -> tuple[dict[str, Status], int]:
        """What the stream tells of these tasks until now, and up to which offset. Raises BrokerError.

        Of tasks that have ended for good nothing more is read, unless ``to_the_end``.
        """
        future: asyncio.Future[tuple[dict[str, Status], int]] = asyncio.get_running_loop().create_future()
        self._asked.append(_Question(ids, to_the_end, future))
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
            search = _Search(
                (id_ for question in asked for id_ in question.ids), any(question.to_the_end for question in asked)
            )
            try:
                answer = await self._insist(partial(self._read, search))
            except BaseException as error:
                _fail(asked, error)
                # aiormq cancels what waits on a connection that it gives up; whoever asked meanwhile still waits.
                if amqp.is_cancelled() or not isinstance(error, (Exception, asyncio.CancelledError)):
                    raise
            else:
                for question in asked:
                    if not question.answer.done():
                        question.answer.set_result(answer)

    async def _insist(self, read: Callable[[asyncio.Timeout], Awaitable[T]]) -> T:
        """Read, again and again while the broker is unavailable, for as long as the timeout; longer while news come."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._stream.timeout
        pauses = backoff()
        while True:
            pause = next(pauses)
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    return await read(limit)
            except TimeoutError as error:
                raise BrokerUnavailable(f"RabbitMQ did not answer within {self._stream.timeout:g} s") from error
            except (BrokerUnavailable, BrokerRefused) as error:
                if not self._stream.may_pass(error) or clock() + pause > deadline:
                    raise
            await asyncio.sleep(pause)

    async def _read(self, search: _Search, limit: asyncio.Timeout) -> tuple[dict[str, Status], int]:
        for skew in (_USUAL_SKEW, MOST_SKEW):
            search.begin()
            place = place_of(search.ids, time.time(), self._stream.keep, skew)
            sentinel = new_sentinel()
            async with self._reading(place, search.take, sentinel, limit) as arrival:
                await self._stream.send(Batch(sentinel=sentinel))
                end = await arrival()
            if search.has_all_beginnings or place == "first":
                break
        return search.known, end

    async def _read_back(self, count: int, limit: asyncio.Timeout) -> dict[str, Status]:
        known: dict[str, Status] = {}

        def take(_: int, body: bytes) -> bool:
            batch = read(body)
            for update in [] if batch is None else batch.updates:
                known[update.id] = newer(known.get(update.id), update)
            return False

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
        self, place: Place, take: Callable[[int, bytes], bool], sentinel: str, limit: asyncio.Timeout
    ) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
        """Read from that place on; gives what waits until the sentinel has come, for its offset.

        ``take`` says whether that was enough; it is the end then.
        """
        line = await self._stream.open()

        def take_until_then(offset: int, body: bytes) -> None:
            # What comes before the channel is closed is of another answer: a follower is told of it besides.
            if came.done():
                return
            if take(offset, body):
                came.set_result(offset)
            _extend(limit)

        reading = Reading(line, self._stream.name, take_until_then)
        came = reading.expect(sentinel)
        async with self._stream.reading(line, reading, place, _DOING):
            yield lambda: self._stream.hear(line, reading, came, _DOING)


class _Search:
    """What is found of some tasks, in the order of the stream."""

    def __init__(self, ids: Iterable[str], to_the_end: bool) -> None:
        self._wanted = Wanted(ids)
        self._to_the_end = to_the_end
        self.known: dict[str, Status] = {}
        #: Those whose producer's word was not found yet, and those that may go on.
        self._beginnings: set[str] = set()
        self._open: set[str] = set()

    @property
    def ids(self) -> frozenset[str]:
        return self._wanted.ids

    @property
    def has_all_beginnings(self) -> bool:
        return not self._beginnings

    def begin(self) -> None:
        self.known.clear()
        self._beginnings = set(self.ids)
        self._open = set(self.ids)

    def take(self, _: int, body: bytes) -> bool:
        """Whether nothing more is to be looked for."""
        for update in self._wanted.updates(body):
            status = self.known[update.id] = newer(self.known.get(update.id), update)
            if update.first:
                self._beginnings.discard(update.id)
            if _is_over(status):
                self._open.discard(update.id)
        return not (self._open or self._beginnings or self._to_the_end)


def _is_over(status: Status) -> bool:
    """Whether nothing more can come of it: a dead task may be retried, and an id of a user's own be used again."""
    return status.state in ("succeeded", "cancelled") and tells_its_time(status.id, status.at)


def _extend(limit: asyncio.Timeout) -> None:
    """There is much to read, or this machine is slow: that is no silence."""
    patience, ends_at = asyncio.get_running_loop().time() + SILENCE, limit.when()
    if ends_at is not None and ends_at < patience and not limit.expired():
        limit.reschedule(patience)


def _fail(asked: Sequence[_Question], error: BaseException) -> None:
    """Nobody must wait for an answer that does not come, whatever it was that went wrong."""
    if not isinstance(error, BrokerError):
        failure = BrokerUnavailable(f"reading was given up: {error!r}")
        failure.__cause__ = error
        error = failure
    for question in asked:
        if not question.answer.done():
            question.answer.set_exception(error)


def _ignore(_: int, __: bytes) -> bool:
    """What is not wanted."""
    return False
