"""Following tasks in the file: one bell for all that a program follows, rung when one of them changes."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from leveret.brokers.following import Feed, Feeds, Watch
from leveret.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from leveret.brokers.sqlite.bells import Bell, Bells
    from leveret.brokers.sqlite.records import News
    from leveret.brokers.sqlite.store import Store
    from leveret.brokers.sqlite.writer import Writer
    from leveret.status import Status

log = logging.getLogger("leveret.sqlite")

#: A ring that was lost with its ringer is made up for after so long, at most (seconds).
_ROUND = 2.0


class Watcher:
    """One program's feeds from the file."""

    def __init__(self, writer: Writer, bells: Bells) -> None:
        self._writer = writer
        self._bells = bells
        self._feeds = Feeds()
        self._changing = asyncio.Lock()
        self._bell: Bell | None = None
        self._number = 0
        self._last = 0
        self._wake = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def follow(self, ids: Sequence[str]) -> AsyncGenerator[Feed]:
        async with self._joined(Feed(ids)) as feed:
            yield feed

    @asynccontextmanager
    async def watch(self) -> AsyncGenerator[AsyncIterator[Sequence[Status]]]:
        """Of every task, by a watcher that does nothing else: one that follows some tasks did not see the others'."""
        async with self._joined(Watch()) as watch:
            yield aiter(watch)

    @asynccontextmanager
    async def _joined(self, feed: Feed) -> AsyncGenerator[Feed]:
        try:
            async with self._changing:
                if self._bell is None:
                    await self._register()
                self._feeds.add(feed)
                feed.tell(await self._watch(list(feed.ids)))
            yield feed
        finally:
            await asyncio.shield(self._leave(feed))

    async def close(self) -> None:
        async with self._changing:
            self._feeds.fail(BrokerUnavailable("the file was closed by this program"))
            await self._let_go()

    async def _register(self) -> None:
        bell = self._bells.hang()
        try:
            self._number, self._last = await self._writer.do(lambda store: store.register_watcher(bell.name))
        except BaseException:
            bell.take_down()
            raise
        self._bell = bell
        loop = asyncio.get_running_loop()
        loop.add_reader(bell.reader, self._rung)
        self._listening = loop.create_task(self._listen())

    async def _watch(self, ids: Sequence[str]) -> Sequence[Status]:
        number = self._number
        return await self._writer.do(lambda store: store.records.watch(number, ids))

    async def _leave(self, feed: Feed) -> None:
        async with self._changing:
            self._feeds.remove(feed)
            if self._bell is None:
                return
            if not self._feeds:
                await self._let_go()
                return
            ids = list(feed.ids - self._feeds.ids)
            number = self._number
            with suppress(BrokerError):
                await self._writer.do(lambda store: store.records.unwatch(number, ids))

    async def _let_go(self) -> None:
        bell, self._bell = self._bell, None
        if bell is None:
            return
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        asyncio.get_running_loop().remove_reader(bell.reader)
        bell.take_down()
        number = self._number
        with suppress(BrokerError):
            await self._writer.do(lambda store: store.remove([number]))

    async def _listen(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ROUND):
                    await self._wake.wait()
            self._wake.clear()
            try:
                news = await self._writer.do(partial(_changes, self._number, self._last))
                if news is None:
                    await self._renew()
                    continue
            except BrokerError as error:
                log.warning("news of tasks cannot be read, trying again: %s", error)
                await asyncio.sleep(_ROUND)
                continue
            self._last = news.last
            self._feeds.tell(news.statuses)

    async def _renew(self) -> None:
        """Somebody removed this living watcher: begin anew, and tell all that is known."""
        bell = self._bell
        if bell is None:
            return
        self._number, last = await self._writer.do(lambda store: store.register_watcher(bell.name))
        self._last = min(self._last, last)
        self._feeds.tell(await self._watch(list(self._feeds.ids)))

    def _rung(self) -> None:
        if self._bell is not None:
            self._bell.hush()
        self._wake.set()


def _changes(number: int, last: int, store: Store) -> News | None:
    return store.records.changes(number, last)
