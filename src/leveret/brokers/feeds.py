"""Who in this process waits for news of which tasks."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from leveret.model import newer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from leveret.errors import BrokerError
    from leveret.model import Status

F = TypeVar("F", bound="Feed")
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

    def notify(self, updates: Iterable[Status]) -> None:
        for update in updates:
            if update.id in self.ids:
                status = newer(self._known.get(update.id), update)
                if status != self._known.get(update.id):
                    self._known[update.id] = status
                    self._add(status)

    def catch_up(self, statuses: Iterable[Status]) -> None:
        """What is known of tasks from their beginning until now, past and all: some of it was never told here."""
        for status in statuses:
            known = self._known.get(status.id)
            if known is None or status == known or status.at < known.at:
                self.notify([status])
            else:
                self._known[status.id] = status
                self._add(status)

    def fail(self, error: BrokerError) -> None:
        """There will be no more news."""
        self._error = error
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Status]:
        """What is new. Cancelled while it waits, it takes nothing."""
        while not self._fresh:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        fresh, self._fresh = self._fresh, {}
        return list(fresh.values())

    def _add(self, status: Status) -> None:
        self._fresh[status.id] = status
        self._wake.set()


class Watch(Feed):
    """News of every task, from now on. Nothing is kept of what was read."""

    def __init__(self) -> None:
        super().__init__([EVERY])

    def notify(self, updates: Iterable[Status]) -> None:
        for update in updates:
            self._add(newer(self._fresh.get(update.id), update))
        for id_ in list(islice(self._fresh, max(0, len(self._fresh) - _MOST_UNREAD))):
            del self._fresh[id_]


class Following(Generic[F]):
    """The context in which a feed is open: ``join`` opens it, ``leave`` closes it.

    A class, and no generator: when its program ends, `asyncio.run` closes each generator that is still open, and one
    inside of another (of `Handle.updates`, say) would be closed twice at once.
    """

    def __init__(self, feed: F, join: Callable[[], Awaitable[object]], leave: Callable[[], Awaitable[object]]) -> None:
        self._feed = feed
        self._join = join
        self._leave = leave

    async def __aenter__(self) -> F:
        try:
            await self._join()
        except BaseException:
            await self._leave()
            raise
        return self._feed

    async def __aexit__(self, *_: object) -> None:
        await self._leave()


class Feeds:
    """The open feeds of one broker. What is told of a task costs no more for all the others that are followed."""

    def __init__(self) -> None:
        self._feeds: set[Feed] = set()
        self._by_id: dict[str, set[Feed]] = {}

    def __bool__(self) -> bool:
        return bool(self._feeds)

    @property
    def ids(self) -> Collection[str]:
        return self._by_id.keys()

    def add(self, feed: Feed) -> None:
        self._feeds.add(feed)
        for id_ in feed.ids:
            self._by_id.setdefault(id_, set()).add(feed)

    def remove(self, feed: Feed) -> Sequence[str]:
        """The ids that no other one follows."""
        if feed not in self._feeds:
            return ()
        self._feeds.remove(feed)
        left = [id_ for id_ in feed.ids if self._by_id[id_] == {feed}]
        for id_ in feed.ids:
            self._by_id[id_].discard(feed)
        for id_ in left:
            del self._by_id[id_]
        return left

    def notify(self, updates: Sequence[Status]) -> None:
        if not self._feeds:
            return
        every = self._by_id.get(EVERY, ())
        theirs: dict[Feed, list[Status]] = {}
        for update in updates:
            for feed in (*every, *self._by_id.get(update.id, ())):
                theirs.setdefault(feed, []).append(update)
        for feed, mine in theirs.items():
            feed.notify(mine)

    def fail(self, error: BrokerError) -> None:
        """There will be no more news for any."""
        for feed in self._feeds:
            feed.fail(error)
