"""Following tasks in the file: one wake-up for all that a program follows."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from leveret.brokers.feeds import F, Feed, Feeds, Following, Watch
from leveret.brokers.sqlite.problems import Trouble
from leveret.brokers.sqlite.wakeup import listening
from leveret.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.sqlite.statuses import Changes
    from leveret.brokers.sqlite.store import Store
    from leveret.brokers.sqlite.wakeup import Listener, WakeUps
    from leveret.brokers.sqlite.writer import Writer
    from leveret.model import Status

log = logging.getLogger("leveret.sqlite")

#: If who would have woken it has died, it looks after so long at most (seconds).
_ROUND = 2.0
#: How often it is looked whether there is a file by now (seconds).
_LOOK = 0.2


class Watcher:
    """One program's feeds from the file."""

    def __init__(self, writer: Writer, wake_ups: WakeUps) -> None:
        self._writer = writer
        self._wake_ups = wake_ups
        self._feeds = Feeds()
        self._changing = asyncio.Lock()
        self._wake_up: Listener | None = None
        self._number = 0
        self._last = 0
        self._wake = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        return self._following(Feed(ids))

    def watch(self) -> Following[Watch]:
        """Of every task, by a watcher that does nothing else: one that follows some tasks did not see the others'."""
        return self._following(Watch())

    def _following(self, feed: F) -> Following[F]:
        return Following(feed, lambda: self._join(feed), lambda: asyncio.shield(self._leave(feed)))

    async def _join(self, feed: Feed) -> None:
        async with self._changing:
            if self._listening is None:
                if self._writer.has_file:
                    await self._register()
                self._listening = asyncio.create_task(self._listen())
            self._feeds.add(feed)
            if self._wake_up is not None:
                feed.notify(await self._watch(list(feed.ids)))

    async def close(self) -> None:
        async with self._changing:
            self._feeds.fail(BrokerUnavailable("the file was closed by this program"))
            await self._let_go()

    async def _register(self) -> None:
        """With a wake-up of its own: one under which it was removed may be removed too at any moment."""
        wake_up = listening(self._wake_ups, self._wake.set, self._writer.path)
        try:
            number, last = await self._writer.do(lambda store: store.registrations.register_watcher(wake_up.name))
        except BaseException:
            wake_up.remove()
            raise
        if self._wake_up is not None:
            self._wake_up.remove()
        self._wake_up, self._number, self._last = wake_up, number, last

    async def _watch(self, ids: Sequence[str]) -> Sequence[Status]:
        number = self._number
        return await self._writer.do(partial(_watch, number, ids))

    async def _leave(self, feed: Feed) -> None:
        async with self._changing:
            ids = self._feeds.remove(feed)
            if not self._feeds:
                await self._let_go()
            if self._wake_up is None:
                return
            number = self._number
            with suppress(BrokerError):
                await self._writer.do(partial(_unwatch, number, ids))

    async def _let_go(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None
        wake_up, self._wake_up = self._wake_up, None
        if wake_up is None:
            return
        wake_up.remove()
        number = self._number
        with suppress(BrokerError):
            await self._writer.do(lambda store: store.registrations.leave(number))

    async def _listen(self) -> None:
        while not self._writer.has_file:
            await asyncio.sleep(_LOOK)  # whoever follows must not make the file: another program will
            self._wake.set()
        trouble = Trouble("news of tasks cannot be read")
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ROUND):
                    await self._wake.wait()
            self._wake.clear()
            try:
                if self._wake_up is None:
                    await self._renew()
                else:
                    self._wake_up.see_to()
                news = await self._writer.do(partial(_changes, self._number, self._last, len(self._feeds.ids)))
                if news is None:
                    await self._renew()
                    trouble.end()
                    continue
            except (BrokerError, OSError) as error:
                trouble.begin(error)
                await asyncio.sleep(_ROUND)
                continue
            trouble.end()
            self._last = news.last
            self._feeds.notify(news.statuses)

    async def _renew(self) -> None:
        """Somebody removed this living watcher: begin anew, and tell all that is known."""
        seen = self._last
        await self._register()
        self._last = min(seen, self._last)
        self._feeds.notify(await self._watch(list(self._feeds.ids)))


def _changes(number: int, last: int, followed: int, store: Store) -> Changes | None:
    return store.watches.changes(number, last, followed) if store.registrations.has(number) else None


def _watch(number: int, ids: Sequence[str], store: Store) -> Sequence[Status]:
    # If the file was replaced since it was registered, the next look sees that, and begins anew.
    if store.registrations.has(number):
        store.watches.add(number, ids)
    return store.records.statuses(ids)


def _unwatch(number: int, ids: Sequence[str], store: Store) -> None:
    if store.registrations.has(number):
        store.watches.remove(number, ids)
