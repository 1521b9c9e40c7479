"""News of tasks as they come, for all in this program who follow some or watch all."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

from leveret.brokers.backoff import backoff
from leveret.brokers.feeds import Feed, Following, Watch
from leveret.brokers.rabbitmq.statuses.status_stream import lacks_permission
from leveret.brokers.rabbitmq.statuses.streams import (
    SILENCE,
    Batch,
    Place,
    Reading,
    Wanted,
    last_offset,
    new_sentinel,
    place_of,
    read,
)
from leveret.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.rabbitmq.amqp import connections as amqp
    from leveret.brokers.rabbitmq.statuses.reader import StatusReader
    from leveret.brokers.rabbitmq.statuses.recent import Recent
    from leveret.brokers.rabbitmq.statuses.status_stream import StatusStream
    from leveret.model import Status

log = logging.getLogger("leveret.rabbitmq")

#: The stream is read on for so long after the last who followed has gone: the next one comes soon (seconds).
_LINGER = 60.0
#: After so long without news whoever follows makes sure that it would hear some (seconds, and half as much more by
#: chance: of many who follow the first one's sentinel is heard by all, and is theirs too).
_QUIET = 15.0


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
            self._early.append((offset, updates))
        elif offset > self._seen:
            self.feed.notify(updates)

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
    """One that takes whatever comes. After a lost connection the reader goes on where it was: see `StatusFollower`."""

    @property
    def ids(self) -> frozenset[str]:
        return frozenset()

    def take(self, offset: int, updates: list[Status]) -> None:
        del offset
        self.feed.notify(updates)

    def begin(self, known: Sequence[Status], seen: int) -> None:
        """Nothing was read for it."""


class StatusFollower:
    """Reads the stream as long as anybody follows. ``reader``: tells what is known when they begin."""

    def __init__(self, stream: StatusStream, reader: StatusReader, recent: Recent) -> None:
        self._stream = stream
        self._reader = reader
        self._subscriptions: set[_Subscription] = set()
        self._watching: set[_Subscription] = set()
        self._by_id: dict[str, set[_Subscription]] = {}
        #: The tasks of `_by_id`; None: others since.
        self._wanted: Wanted | None = None
        self._recent = recent
        self._following: asyncio.Task[None] | None = None
        self._attached = asyncio.Event()
        #: From where on nothing was taken yet.
        self._place: Place = "next"
        self._ending: asyncio.TimerHandle | None = None
        self._heard: tuple[amqp.Link, Reading] | None = None

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        feed = Feed(ids)
        subscription = _Subscription(feed)

        async def join() -> None:
            await self._join(subscription)
            lately = self._recent.known(ids)
            if lately is not None:
                subscription.begin(lately, self._last_offset)
                return
            mark = self._recent.mark
            known, offset = await self._reader.ask(ids)
            self._recent.note_found(known.values(), offset, mark)
            subscription.begin(list(known.values()), offset)

        return Following(feed, join, lambda: self._leave(subscription))

    def watch(self) -> Following[Watch]:
        watch = Watch()
        subscription = _Watching(watch)

        async def join() -> None:
            self._watching.add(subscription)
            await self._join(subscription)

        async def leave() -> None:
            self._watching.discard(subscription)
            await self._leave(subscription)

        return Following(watch, join, leave)

    @property
    def _last_offset(self) -> int:
        return self._place - 1 if isinstance(self._place, int) else -1

    async def _join(self, subscription: _Subscription) -> None:
        self._subscriptions.add(subscription)
        for id_ in subscription.ids:
            self._by_id.setdefault(id_, set()).add(subscription)
            self._wanted = None
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
        await self._until_attached(self._start())

    def _start(self) -> asyncio.Task[None]:
        if self._following is None:
            self._attached.clear()
            self._following = asyncio.get_running_loop().create_task(self._follow())
            self._following.add_done_callback(self._fail_feeds)
        return self._following

    async def _leave(self, subscription: _Subscription) -> None:
        self._subscriptions.discard(subscription)
        for id_ in subscription.ids & self._by_id.keys():
            self._by_id[id_].discard(subscription)
            if not self._by_id[id_]:
                del self._by_id[id_]
            self._wanted = None
        if not self._subscriptions and self._ending is None:
            self._end_later()

    def stay(self) -> None:
        """Read on for a while though nobody follows: whoever asks often is answered from what came."""
        if self._subscriptions:
            return
        if self._ending is not None:
            self._ending.cancel()
        self._start()
        self._end_later()

    async def hear_all(self) -> None:
        """Return when all that was said until now has come. Raises BrokerUnavailable."""
        if self._heard is None:
            raise BrokerUnavailable("the news of tasks are not read now")
        line, reading = self._heard
        sentinel = new_sentinel()
        came = reading.expect(sentinel)
        await self._stream.send(Batch(sentinel=sentinel))
        await self._stream.hear(line, reading, came, "asking what became of tasks")

    def _end_later(self) -> None:
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
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

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
                if not self._stream.may_pass(error):
                    raise
                log.warning("news of tasks cannot be read, trying again in %.1f s: %s", pause, error)
            await asyncio.sleep(pause)

    async def _follow_once(self) -> None:
        line = await self._stream.open()
        reading = Reading(line, self._stream.name, self._take)
        is_again = self._attached.is_set()
        reads_on = is_again and bool(self._watching)
        place = self._place if reads_on else "next"
        for subscription in self._subscriptions:
            subscription.forget()
        async with self._stream.reading(line, reading, place, "following tasks"):
            if not reads_on:
                self._place = place_of([], time.time(), self._stream.keep)
            self._attached.set()
            self._recent.begin()
            self._heard = line, reading
            if is_again and self._subscriptions:
                await self._read_up(place)
            line.when_lost(reading.give_up)
            try:
                await self._until_over(line, reading)
            finally:
                self._heard = None
                self._recent.end()
            if reading.was_cancelled:
                self._place = place_of([], time.time(), self._stream.keep)

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
            await self._stream.send(Batch(sentinel=sentinel))
        except BrokerError as error:
            if lacks_permission(error):
                await self._compare(line)
            # Else that proves nothing: an alarm may be on.
            log.debug("no sentinel could be sent: %s", error)
        else:
            await self._stream.hear(line, reading, came, "following tasks")

    async def _compare(self, line: amqp.Link) -> None:
        """For whoever may not write: look whether the stream's last message has come. Raises BrokerUnavailable."""
        end = await self._stream.run(line, last_offset(line.connection, self._stream.name), "following tasks")
        await asyncio.sleep(SILENCE)
        if end is not None and isinstance(self._place, int) and self._place <= end:
            await self._stream.give_up(line)
            raise BrokerUnavailable("news of tasks are stored that are not read from the stream")

    async def _read_up(self, place: Place) -> None:
        """Learn what came while nothing was read, also for those who joined in that time and asked on their own."""
        subscriptions = list(self._subscriptions)
        for subscription in subscriptions:
            subscription.forget()
        known, offset = await self._reader.ask([id_ for one in subscriptions for id_ in one.ids], to_the_end=True)
        if isinstance(place, int) and offset < place:
            self._place = "first"
            raise BrokerUnavailable(f"the stream {self._stream.name!r} was deleted meanwhile, and made again")
        for subscription in subscriptions:
            subscription.begin(list(known.values()), offset)

    def _take(self, offset: int, body: bytes) -> None:
        self._place = offset + 1
        self._recent.take(offset, body)
        theirs: dict[_Subscription, list[Status]] = {}
        for update in self._updates(body):
            for subscription in (*self._watching, *self._by_id.get(update.id, ())):
                theirs.setdefault(subscription, []).append(update)
        for subscription, updates in theirs.items():
            subscription.take(offset, updates)

    def _updates(self, body: bytes) -> Sequence[Status]:
        """Those that anybody here wants."""
        if self._watching:
            batch = read(body)
            return [] if batch is None else batch.updates
        if self._wanted is None:
            self._wanted = Wanted(self._by_id)
        return self._wanted.updates(body)
