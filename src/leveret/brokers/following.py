"""Who in this process waits for news of which tasks."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING

from leveret.status import newer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from leveret.errors import BrokerError
    from leveret.status import Status


#: In the place of an id: whoever follows it follows every task.
EVERY = ""
#: So many tasks' news are kept for a reader of everything that is slow; then the oldest are dropped.
_MOST_UNREAD = 10_000


class Feed:
    """News of some tasks: what is known of each at first, then what changes. Slow readers get the latest of each."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = frozenset(ids)
        self._known: dict[str, Status] = {}
        self._fresh: dict[str, Status] = {}
        self._wake = asyncio.Event()
        self._error: BrokerError | None = None

    def tell(self, updates: Iterable[Status]) -> None:
        for update in updates:
            if update.id in self.ids:
                status = newer(self._known.get(update.id), update)
                if status != self._known.get(update.id):
                    self._known[update.id] = status
                    self._add(status)

    def fail(self, error: BrokerError) -> None:
        """There will be no more news."""
        self._error = error
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Sequence[Status]]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            fresh, self._fresh = self._fresh, {}
            if fresh:
                yield list(fresh.values())
            if self._error is not None:
                raise self._error

    def _add(self, status: Status) -> None:
        self._fresh[status.id] = status
        self._wake.set()


class Watch(Feed):
    """News of every task, from now on. Nothing is kept of what was read."""

    def __init__(self) -> None:
        super().__init__([EVERY])

    def tell(self, updates: Iterable[Status]) -> None:
        for update in updates:
            self._add(newer(self._fresh.get(update.id), update))
        for id_ in list(islice(self._fresh, max(0, len(self._fresh) - _MOST_UNREAD))):
            del self._fresh[id_]


class Feeds:
    """The open feeds of one broker."""

    def __init__(self) -> None:
        self._feeds: set[Feed] = set()

    def __bool__(self) -> bool:
        return bool(self._feeds)

    @property
    def ids(self) -> frozenset[str]:
        return frozenset().union(*(feed.ids for feed in self._feeds))

    def add(self, feed: Feed) -> None:
        self._feeds.add(feed)

    def remove(self, feed: Feed) -> None:
        self._feeds.discard(feed)

    def tell(self, updates: Sequence[Status]) -> None:
        for feed in self._feeds:
            feed.tell(updates)

    def fail(self, error: BrokerError) -> None:
        """There will be no more news for any."""
        for feed in self._feeds:
            feed.fail(error)
