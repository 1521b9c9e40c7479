"""News of tasks, read from RabbitMQ's stream for all in this program who wait for them."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from leveret.brokers.backoff import backoff
from leveret.brokers.feeds import Feed, Following, Watch
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.statuses.streams import (
    SILENCE,
    Batch,
    Place,
    Reading,
    last_offset,
    new_sentinel,
    place_of,
)
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable
from leveret.model import newer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence

    from leveret.brokers.rabbitmq.amqp import Hosts
    from leveret.brokers.rabbitmq.statuses.log import StatusLog
    from leveret.model import Status

T = TypeVar("T")

log = logging.getLogger("leveret.rabbitmq")

#: How many of the last messages are read for an overview; more only if those tell of too few tasks.
_LOOK_BACK = (100, 1_000)
#: The stream is read on for so long after the last who followed has gone: the next one comes soon (seconds).
_LINGER = 5.0
#: After so long without news whoever follows makes sure that it would hear some (seconds, and half as much more by
#: chance: of many who follow the first one's sentinel is heard by all, and is theirs too).
_QUIET = 15.0


def lacks_permission(error: Exception) -> bool:
    """Whether this was refused, and not the connection: that may be for a moment, while a password is changed, say."""
    return isinstance(error, BrokerRefused) and (
        error.__cause__ is None or isinstance(error.__cause__, amqp.ChannelAccessRefused)
    )


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
        self._early.clear()  # what was kept before is read anew; it may be of a stream that was deleted since

    def begin(self, known: Sequence[Status], seen: int) -> None:
        self.feed.catch_up(known)
        self._seen = seen
        early, self._early = self._early, []
        for offset, updates in early:
            self.take(offset, updates)


class _Watching(_Subscription):
    """One that takes whatever comes. After a lost connection the reader goes on where it was: see `StatusReader`."""

    @property
    def ids(self) -> frozenset[str]:
        return frozenset()

    def take(self, offset: int, updates: list[Status]) -> None:
        del offset
        self.feed.tell(updates)

    def begin(self, known: Sequence[Status], seen: int) -> None:
        """Nothing was read for it."""


_Asked: TypeAlias = "tuple[Sequence[str], asyncio.Future[tuple[dict[str, Status], int]]]"


class StatusReader:
    """Reads the stream on a connection of its own: an alarm stops connections that publish."""

    def __init__(self, hosts: Hosts, events: StatusLog) -> None:
        self._hosts = hosts
        self._events = events
        self._opening = asyncio.Lock()
        self._line: amqp.Link | None = None
        self._subscriptions: set[_Subscription] = set()
        self._following: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        #: From where on nothing was taken yet.
        self._place: Place = "next"
        self._ending: asyncio.TimerHandle | None = None
        self._asked: list[_Asked] = []
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, ids: Sequence[str]) -> tuple[dict[str, Status], int]:
        """All that the stream tells of these tasks until now, and up to which offset. Raises BrokerError."""
        future: asyncio.Future[tuple[dict[str, Status], int]] = asyncio.get_running_loop().create_future()
        self._asked.append((ids, future))
        if self._answering is None or self._answering.done():
            self._answering = asyncio.get_running_loop().create_task(self._answer())
        return await future

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        feed = Feed(ids)
        subscription = _Subscription(feed)

        async def join() -> None:
            await self._join(subscription)
            known, offset = await self.ask(ids)
            subscription.begin(list(known.values()), offset)

        return Following(feed, join, lambda: self._leave(subscription))

    def watch(self) -> Following[Watch]:
        watch = Watch()
        subscription = _Watching(watch)
        return Following(watch, lambda: self._join(subscription), lambda: self._leave(subscription))

    async def _join(self, subscription: _Subscription) -> None:
        self._subscriptions.add(subscription)
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        if self._following is None:
            self._attached.clear()
            self._following = asyncio.get_running_loop().create_task(self._follow())
            self._following.add_done_callback(self._fail_feeds)
        await self._until_attached(self._following)

    async def _leave(self, subscription: _Subscription) -> None:
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
        if following is not self._following:
            return  # ended when nobody was left; whoever came while it closed its channel has another one
        self._following = None
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
        # Who asked while others were answered, or before the answering had begun.
        asked, self._asked = self._asked, []
        _fail(asked, BrokerUnavailable("the broker is closed"))
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
            except BrokerError as error:
                if not self._may_pass(error):
                    raise
                log.warning("news of tasks cannot be read, trying again in %.1f s: %s", pause, error)
            await asyncio.sleep(pause)

    async def _follow_once(self) -> None:
        line = await self._opened()
        reading = Reading(line.connection, self._events.stream, self._take)
        is_again = self._attached.is_set()
        reads_on = is_again and any(isinstance(one, _Watching) for one in self._subscriptions)
        place = self._place if reads_on else "next"
        try:
            for subscription in self._subscriptions:
                subscription.forget()
            await self._begin(line, reading, place, "following tasks")
            if not reads_on:
                self._place = place_of([], time.time(), self._events.keep)
            self._attached.set()
            if is_again and self._subscriptions:
                await self._read_up(place)
            line.when_lost(reading.give_up)
            await self._until_over(line, reading)
            if reading.was_cancelled:
                self._place = place_of([], time.time(), self._events.keep)
        finally:
            if not line.is_lost:
                with suppress(*amqp.CONNECTION_LOST):
                    await reading.end()

    async def _until_over(self, line: amqp.Link, reading: Reading) -> None:
        """Read on, and make sure after a while without news that some would be heard."""
        while not await reading.over(_QUIET * random.uniform(1.0, 1.5)):  # noqa: S311 - jitter
            if reading.quiet_for < _QUIET:
                continue
            proof = asyncio.create_task(self._make_sure(line, reading))
            over = asyncio.create_task(reading.over())
            try:
                await asyncio.wait([proof, over], return_when=asyncio.FIRST_COMPLETED)
            finally:
                over.cancel()
                if not proof.done():
                    proof.cancel()
            if proof.done():
                proof.result()

    async def _make_sure(self, line: amqp.Link, reading: Reading) -> None:
        """Send a sentinel, and hear it. Raises BrokerUnavailable when it is not heard."""
        sentinel = new_sentinel()
        came = reading.expect(sentinel)
        try:
            await self._events.send(Batch(sentinel=sentinel))
        except BrokerError as error:
            if lacks_permission(error):
                await self._compare(line)
            # Else that proves nothing: an alarm may be on.
            log.debug("no sentinel could be sent: %s", error)
        else:
            await self._hear(line, reading, came, "following tasks")

    async def _compare(self, line: amqp.Link) -> None:
        """For whoever may not write: look whether the stream's last message has come. Raises BrokerUnavailable."""
        end = await self._on(line, last_offset(line.connection, self._events.stream), "following tasks")
        await asyncio.sleep(SILENCE)
        if end is not None and isinstance(self._place, int) and self._place <= end:
            await self._give_up(line)
            raise BrokerUnavailable("news of tasks are stored that are not read from the stream")

    async def _hear(self, line: amqp.Link, reading: Reading, came: asyncio.Future[int], doing: str) -> int:
        """The offset of a sentinel that is stored. Raises BrokerUnavailable; then the next try is by another host."""
        try:
            return await line.run(reading.hear(came))
        except amqp.CONNECTION_LOST as error:
            if not line.is_lost and not reading.is_over:
                await self._give_up(line)
            raise amqp.translate(error, doing) from error

    async def _give_up(self, line: amqp.Link) -> None:
        """Its node may be parted from the others still: the next one is opened to another."""
        line.host_failed()
        await line.close()

    async def _read_up(self, place: Place) -> None:
        """Learn what came while nothing was read, also for those who joined in that time and asked on their own."""
        subscriptions = list(self._subscriptions)
        for subscription in subscriptions:
            subscription.forget()
        known, offset = await self.ask([id_ for one in subscriptions for id_ in one.ids])
        if isinstance(place, int) and offset < place:
            self._place = "first"
            raise BrokerUnavailable(f"the stream {self._events.stream!r} was deleted meanwhile, and made again")
        for subscription in subscriptions:
            subscription.begin(list(known.values()), offset)

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
                _fail(asked, error)
                # aiormq cancels what waits on a connection that it gives up; whoever asked meanwhile still waits.
                if amqp.is_cancelled() or not isinstance(error, (Exception, asyncio.CancelledError)):
                    raise
            else:
                for _, future in asked:
                    if not future.done():
                        future.set_result(answer)

    async def recent(self, limit: int) -> dict[str, Status]:
        """What the last messages tell of the tasks that they are about. Raises BrokerError."""
        return await self._insist(partial(self._read_back, limit))

    async def _insist(self, read: Callable[[asyncio.Timeout], Awaitable[T]]) -> T:
        """Read, again and again while the broker is unavailable, for as long as the timeout; longer while news come."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._events.timeout
        for pause in backoff():
            try:
                async with asyncio.timeout_at(deadline) as limit:
                    return await read(limit)
            except TimeoutError as error:
                raise BrokerUnavailable(f"RabbitMQ did not answer within {self._events.timeout:g} s") from error
            except (BrokerUnavailable, BrokerRefused) as error:
                if not self._may_pass(error) or clock() + pause > deadline:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    def _may_pass(self, error: BrokerError) -> bool:
        """Whether trying again may help: once there was a connection, its refusal is like its loss."""
        return not isinstance(error, BrokerRefused) or (self._line is not None and not lacks_permission(error))

    async def _read(self, wanted: frozenset[str], limit: asyncio.Timeout) -> tuple[dict[str, Status], int]:
        known: dict[str, Status] = {}

        def take(_: int, batch: Batch) -> None:
            for update in batch.updates:
                if update.id in wanted:
                    known[update.id] = newer(known.get(update.id), update)

        place = place_of(list(wanted), time.time(), self._events.keep)
        sentinel = new_sentinel()
        async with self._reading(place, take, sentinel, limit) as arrival:
            await self._events.send(Batch(sentinel=sentinel))
            return known, await arrival()

    async def _read_back(self, count: int, limit: asyncio.Timeout) -> dict[str, Status]:
        known: dict[str, Status] = {}

        def take(_: int, batch: Batch) -> None:
            for update in batch.updates:
                known[update.id] = newer(known.get(update.id), update)

        sentinel = new_sentinel()
        async with self._reading("last", _ignore, sentinel, limit) as arrival:
            await self._events.send(Batch(sentinel=sentinel))
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
        line = await self._opened()

        def take_until_then(offset: int, batch: Batch) -> None:
            # What comes before the channel is closed is of another answer: a follower is told of it besides.
            if not came.done():
                take(offset, batch)
                _extend(limit)

        reading = Reading(line.connection, self._events.stream, take_until_then)
        came = reading.expect(sentinel)
        try:
            await self._begin(line, reading, place, "reading what became of tasks")
            yield lambda: self._hear(line, reading, came, "reading what became of tasks")
        finally:
            if not line.is_lost:
                with suppress(*amqp.CONNECTION_LOST):
                    await reading.end()

    async def _begin(self, line: amqp.Link, reading: Reading, place: Place, doing: str) -> None:
        try:
            await self._on(line, reading.begin(place), doing)
        except BrokerUnavailable as error:
            if isinstance(error.__cause__, amqp.ChannelNotFoundEntity):
                await self._events.make()  # it was deleted, and nobody may have anything to write to it
            raise

    async def _opened(self) -> amqp.Link:
        async with self._opening:
            if self._line is None or self._line.is_lost:
                if self._line is not None:
                    await self._line.close()
                await self._events.make()
                self._line = await amqp.Link.open(self._hosts, purpose="reader", confirms=False)
            return self._line

    async def _on(self, line: amqp.Link, operation: Coroutine[object, object, T], doing: str) -> T:
        try:
            return await line.run(operation)
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, doing) from error


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
