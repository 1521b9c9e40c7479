"""What becomes of tasks on RabbitMQ: told to one stream, and read from it by whoever waits."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers.backoff import backoff
from leveret.brokers.following import Feed, Watch
from leveret.brokers.rabbitmq import amqp
from leveret.brokers.rabbitmq.declare import make_stream
from leveret.brokers.rabbitmq.streams import (
    Batch,
    Place,
    Reading,
    events_declaration,
    new_sentinel,
    place_of,
    to_message,
    was_just_made,
)
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable, QueueNotFound
from leveret.status import newer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence

    from leveret.brokers.rabbitmq.publisher import Publisher
    from leveret.status import Status

T = TypeVar("T")

log = logging.getLogger("leveret.rabbitmq")

#: What is told within this time goes out as one message (seconds).
_GATHER = 0.02
#: How long an outcome may wait for its update; then the update follows when it can (seconds).
_PATIENCE = 2.0
#: Updates in one message, and those that wait while the broker takes none; then the oldest are dropped.
_MOST_IN_ONE = 500
_MOST_WAITING = 20_000
#: About so many bytes of results in one message.
_MOST_BYTES = 256 * 1024
#: How long what was told may take to go out when the program ends (seconds).
_FAREWELL = 2.0
#: How many of the last messages are read for an overview; more only if those tell of too few tasks.
_LOOK_BACK = (100, 1_000)
#: The stream is read on for so long after the last who followed has gone: the next one comes soon (seconds).
_LINGER = 5.0


class Events:
    """One program's way to and from the stream."""

    def __init__(self, urls: Sequence[str], publisher: Publisher, *, keep: float, timeout: float) -> None:
        self._publisher = publisher
        self._keep = keep
        self._timeout = timeout
        self._stream = events_declaration(keep)
        self._is_made = False
        self._refusal: BrokerRefused | None = None
        self._waiting: list[Status] = []
        #: The broker takes none now; what waits is tried again and again.
        self._is_behind = False
        self._flushing: asyncio.Task[None] | None = None
        self._reader = _Reader(urls, self)

    async def record(self, updates: Sequence[Status]) -> None:
        """Durable when it returns, unless the broker takes nothing now: then soon, or if it refuses: never."""
        if not updates or self._refusal is not None:
            return
        if self._is_behind:
            self._hold(updates)  # one that waits is enough: the others' outcomes must not be late for it
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._publish(updates)
        except BrokerRefused as error:
            self._give_up(error)
        except (BrokerError, TimeoutError) as error:
            log.warning("%d results and statuses could not be stored yet: %s", len(updates), str(error) or "no answer")
            self._is_behind = True
            self._hold(updates)

    def tell(self, updates: Sequence[Status]) -> None:
        """Sent in a moment, together with what else is told until then."""
        if self._refusal is None:
            self._hold(updates)

    async def statuses(self, ids: Sequence[str]) -> Sequence[Status]:
        known, _ = await self._reader.ask(ids)
        while young := [id_ for id_ in ids if id_ not in known and was_just_made(id_, time.time())]:
            # Its producer tells of it a moment after it is stored.
            await asyncio.sleep(_GATHER)
            later, _ = await self._reader.ask(young)
            known |= later
        return [known[id_] for id_ in dict.fromkeys(ids) if id_ in known]

    @asynccontextmanager
    async def follow(self, ids: Sequence[str]) -> AsyncGenerator[Feed]:
        async with self._reader.follow(ids) as feed:
            yield feed

    @asynccontextmanager
    async def watch(self) -> AsyncGenerator[AsyncIterator[Sequence[Status]]]:
        async with self._reader.watch() as watch:
            yield aiter(watch)

    async def recent(self, limit: int) -> Sequence[Status]:
        known = await self._reader.recent(limit)
        return sorted(known.values(), key=lambda status: status.at, reverse=True)[:limit]

    async def close(self) -> None:
        if self._flushing is not None:
            await asyncio.wait([self._flushing], timeout=_FAREWELL)
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._reader.close()

    async def send(self, batch: Batch) -> None:
        """Raises BrokerError."""
        for _ in range(2):
            if not self._is_made:
                await self.make()
            try:
                return await self._publisher.publish([to_message(self._stream.name, batch)])
            except QueueNotFound:
                self._is_made = False
        raise BrokerUnavailable(f"the stream {self._stream.name!r} is deleted again and again")

    async def make(self) -> None:
        """Have the stream be there. Raises BrokerError."""
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
            await self.send(Batch(updates=list(part)))

    def _give_up(self, error: BrokerRefused) -> None:
        self._refusal = error
        log.warning("no results and statuses are stored, for want of a permission: %s", error)

    def _hold(self, updates: Sequence[Status]) -> None:
        self._waiting.extend(updates)
        if len(self._waiting) > _MOST_WAITING:
            log.warning("%d results and statuses are lost", len(self._waiting) - _MOST_WAITING)
            del self._waiting[:-_MOST_WAITING]
        if self._waiting and (self._flushing is None or self._flushing.done()):
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(_GATHER)
        for pause in backoff():
            if not self._waiting:
                self._is_behind = False
                return
            updates, self._waiting = self._waiting, []
            try:
                await self._publish(updates)
            except BrokerRefused as error:
                self._give_up(error)
                return
            except BrokerError as error:
                log.warning("%d results and statuses could not be stored yet: %s", len(updates), error)
                self._waiting[:0] = updates
                await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")


def _parts(updates: Sequence[Status]) -> list[list[Status]]:
    """As many messages as they need."""
    parts: list[list[Status]] = [[]]
    size = 0
    for update in updates:
        weight = len(update.traceback) + len(bytes(update.result))
        if parts[-1] and (len(parts[-1]) >= _MOST_IN_ONE or size + weight > _MOST_BYTES):
            parts.append([])
            size = 0
        parts[-1].append(update)
        size += weight
    return parts


class _Subscription:
    """A feed, and up to which offset it knows all; None: what comes is kept until that is known."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self._seen: int | None = None
        self._early: list[tuple[int, list[Status]]] = []

    @property
    def ids(self) -> frozenset[str]:
        """The tasks that are to be read up on after a lost connection."""
        return self.feed.ids

    def take(self, offset: int, updates: list[Status]) -> None:
        if self._seen is None:
            mine = [update for update in updates if update.id in self.feed.ids]
            if mine:
                self._early.append((offset, mine))
        elif offset > self._seen:
            self.feed.tell(updates)

    def forget(self) -> None:
        """Much may have come that was not seen: keep what comes until `begin`."""
        self._seen = None

    def begin(self, known: Sequence[Status], seen: int) -> None:
        self.feed.tell(known)
        self._seen = seen
        early, self._early = self._early, []
        for offset, updates in early:
            self.take(offset, updates)


class _Watching(_Subscription):
    """One that takes whatever comes. After a lost connection the reader goes on where it was: see `_Reader`."""

    @property
    def ids(self) -> frozenset[str]:
        return frozenset()

    def take(self, offset: int, updates: list[Status]) -> None:
        del offset
        self.feed.tell(updates)


class _Reader:
    """Reads the stream on a connection of its own: an alarm stops connections that publish."""

    def __init__(self, urls: Sequence[str], events: Events) -> None:
        self._urls = urls
        self._events = events
        self._opening = asyncio.Lock()
        self._line: amqp.Line | None = None
        self._subscriptions: set[_Subscription] = set()
        self._following: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        #: From where on nothing was taken yet.
        self._place: Place = "next"
        self._ending: asyncio.TimerHandle | None = None
        self._asked: list[tuple[Sequence[str], asyncio.Future[tuple[dict[str, Status], int]]]] = []
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, ids: Sequence[str]) -> tuple[dict[str, Status], int]:
        """All that the stream tells of these tasks until now, and up to which offset. Raises BrokerError."""
        future: asyncio.Future[tuple[dict[str, Status], int]] = asyncio.get_running_loop().create_future()
        self._asked.append((ids, future))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.get_running_loop().create_task(self._answer())
        return await future

    @asynccontextmanager
    async def follow(self, ids: Sequence[str]) -> AsyncGenerator[Feed]:
        subscription = _Subscription(Feed(ids))
        async with self._joined(subscription):
            known, offset = await self.ask(ids)
            subscription.begin(list(known.values()), offset)
            yield subscription.feed

    @asynccontextmanager
    async def watch(self) -> AsyncGenerator[Feed]:
        subscription = _Watching(Watch())
        async with self._joined(subscription):
            yield subscription.feed

    @asynccontextmanager
    async def _joined(self, subscription: _Subscription) -> AsyncGenerator[None]:
        self._subscriptions.add(subscription)
        try:
            if self._ending is not None:
                self._ending.cancel()
                self._ending = None
            if self._following is None or self._following.done():
                self._attached.clear()
                self._following = asyncio.get_running_loop().create_task(self._follow())
                self._following.add_done_callback(self._fail_feeds)
            await self._until_attached(self._following)
            yield
        finally:
            self._subscriptions.discard(subscription)
            if not self._subscriptions and self._ending is None:
                self._ending = asyncio.get_running_loop().call_later(_LINGER, self._end_following)

    def _end_following(self) -> None:
        self._ending = None
        if self._following is not None:
            self._following.cancel()
            self._following = None

    def _fail_feeds(self, following: asyncio.Task[None]) -> None:
        error = None if following.cancelled() else following.exception()
        for subscription in self._subscriptions:
            subscription.feed.fail(
                error if isinstance(error, BrokerError) else BrokerUnavailable("the news of tasks have ended")
            )

    async def close(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        tasks = [task for task in (self._following, self._answering) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._line is not None:
            await self._line.close()

    async def _until_attached(self, following: asyncio.Task[None]) -> None:
        attached = asyncio.ensure_future(self._attached.wait())
        try:
            await asyncio.wait([attached, following], return_when=asyncio.FIRST_COMPLETED)
        finally:
            attached.cancel()
        if following.done() and not following.cancelled():
            following.result()

    async def _follow(self) -> None:
        """Pass on what comes, across lost connections. Raises BrokerRefused."""
        for pause in backoff():
            try:
                await self._follow_once()
            except BrokerRefused:
                raise
            except BrokerError as error:
                log.warning("news of tasks cannot be read, trying again in %.1f s: %s", pause, error)
            await asyncio.sleep(pause)

    async def _follow_once(self) -> None:
        line = await self._opened()
        reading = Reading(line.connection, self._events.stream, self._take)
        try:
            known_before = list(self._subscriptions) if self._attached.is_set() else []
            for subscription in known_before:
                subscription.forget()
            is_again = any(isinstance(one, _Watching) for one in known_before)
            await self._on(line, reading.begin(self._place if is_again else "next"), "following tasks")
            if not is_again:
                self._place = place_of([], time.time(), self._events.keep)
            self._attached.set()
            ids = [id_ for one in known_before for id_ in one.ids]
            if ids:
                known, offset = await self.ask(ids)
                for subscription in known_before:
                    subscription.begin(list(known.values()), offset)
            await line.lost()
        finally:
            if not line.is_lost:
                with suppress(*amqp.CONNECTION_LOST):
                    await reading.end()

    def _take(self, offset: int, batch: Batch) -> None:
        self._place = offset + 1
        if batch.updates:
            for subscription in self._subscriptions:
                subscription.take(offset, batch.updates)

    async def _answer(self) -> None:
        """Read for all that asked, those together that asked while this was busy."""
        while self._asked:
            asked, self._asked = self._asked, []
            wanted = frozenset(id_ for ids, _ in asked for id_ in ids)
            try:
                answer = await self._insist(partial(self._read, wanted))
            except BaseException as error:
                for _, future in asked:
                    if not future.done():
                        future.set_exception(
                            error if isinstance(error, BrokerError) else BrokerUnavailable("reading was given up")
                        )
                if not isinstance(error, BrokerError):
                    raise
            else:
                for _, future in asked:
                    if not future.done():
                        future.set_result(answer)

    async def recent(self, limit: int) -> dict[str, Status]:
        """What the last messages tell of the tasks that they are about. Raises BrokerError."""
        return await self._insist(partial(self._read_back, limit))

    async def _insist(self, read: Callable[[], Awaitable[T]]) -> T:
        """Read, again and again while the broker is unavailable, for as long as the timeout."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._events.timeout
        for pause in backoff():
            try:
                async with asyncio.timeout_at(deadline):
                    return await read()
            except TimeoutError as error:
                raise BrokerUnavailable(f"RabbitMQ did not answer within {self._events.timeout:g} s") from error
            except BrokerUnavailable:
                if clock() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    async def _read(self, wanted: frozenset[str]) -> tuple[dict[str, Status], int]:
        known: dict[str, Status] = {}

        def take(_: int, batch: Batch) -> None:
            for update in batch.updates:
                if update.id in wanted:
                    known[update.id] = newer(known.get(update.id), update)

        place = place_of(list(wanted), time.time(), self._events.keep)
        sentinel = new_sentinel()
        async with self._reading(place, take, sentinel) as arrival:
            await self._events.send(Batch(sentinel=sentinel))
            return known, await arrival()

    async def _read_back(self, limit: int) -> dict[str, Status]:
        known: dict[str, Status] = {}

        def take(_: int, batch: Batch) -> None:
            for update in batch.updates:
                known[update.id] = newer(known.get(update.id), update)

        sentinel = new_sentinel()
        async with self._reading("last", _ignore, sentinel) as arrival:
            await self._events.send(Batch(sentinel=sentinel))
            end = await arrival()
        for messages in _LOOK_BACK:
            known.clear()
            async with self._reading(max(0, end - messages), take, sentinel) as arrival:
                await arrival()
            if len(known) >= limit:
                break
        return known

    @asynccontextmanager
    async def _reading(
        self, place: Place, take: Callable[[int, Batch], None], sentinel: str
    ) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
        """Read from that place on; gives what waits until the sentinel has come, for its offset."""
        line = await self._opened()
        reading = Reading(line.connection, self._events.stream, take)
        came = reading.expect(sentinel)
        try:
            await self._on(line, reading.begin(place), "reading what became of tasks")
            yield lambda: self._on(line, _awaited(came), "reading what became of tasks")
        finally:
            if not line.is_lost:
                with suppress(*amqp.CONNECTION_LOST):
                    await reading.end()

    async def _opened(self) -> amqp.Line:
        async with self._opening:
            if self._line is None or self._line.is_lost:
                if self._line is not None:
                    await self._line.close()
                await self._events.make()
                self._line = await amqp.Line.open(self._urls, purpose="reader", confirms=False)
            return self._line

    async def _on(self, line: amqp.Line, operation: Coroutine[object, object, T], doing: str) -> T:
        try:
            return await line.run(operation)
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error


def _ignore(offset: int, batch: Batch) -> None:
    """What is not wanted."""


async def _awaited(future: asyncio.Future[int]) -> int:
    return await future
