"""The dead letters that the dashboard has read, for a while; and what is done with them."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from leveret.dashboard.tasks import LISTED_REASON
from leveret.model import DeadLetter, shorten

if TYPE_CHECKING:
    from leveret.client import App

#: What was read is read again after that (seconds), though their number has not changed.
_STALE_LETTERS = 15.0
#: Dead letters of one queue that are looked through.
MOST_LETTERS = 10_000
#: So many of them are remembered whole.
_MOST_OPENED = 8
#: A larger body is not shown on a page (bytes).
_LARGEST_BODY = 256 * 1024


class _Letters(msgspec.Struct, frozen=True):
    letters: Sequence[DeadLetter]
    asked: float
    #: How many there were when this was asked, as the counts told.
    count: int


class DeadLetters:
    """RabbitMQ hands a dead letter to one reader at a time, and another one would not find it: they take turns."""

    def __init__(self, app: App) -> None:
        self._app = app
        #: Without what may be large, and those that somebody looks at.
        self._listed: dict[str, _Letters] = {}
        self._opened: OrderedDict[tuple[str, str], _Letters] = OrderedDict()
        self._at_the_letters = asyncio.Lock()

    async def listed(self, queue: str, count: int) -> Sequence[DeadLetter]:
        """A queue's dead letters, the oldest first; it has so many, as the counts tell. Raises BrokerError."""
        async with self._at_the_letters:
            known = self._listed.get(queue)
            if known is None or known.count != count or time.monotonic() - known.asked > _STALE_LETTERS:
                known = self._listed[queue] = _Letters(await self._read(queue), time.monotonic(), count)
            return known.letters

    async def current(self, queue: str) -> Sequence[DeadLetter]:
        """The same, as they are at this moment, to decide about them. Raises BrokerError."""
        async with self._at_the_letters:
            return await self._read(queue)

    async def retry(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        """See `leveret.brokers.DeadLetters.retry`."""
        async with self._at_the_letters:
            return await self._app.client.broker.dead_letters.retry(queue, ids)

    async def drop(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        """See `leveret.brokers.DeadLetters.drop`."""
        async with self._at_the_letters:
            return await self._app.client.broker.dead_letters.drop(queue, ids)

    async def whole(self, queue: str, id_: str) -> DeadLetter | None:
        """One whole, but for a body that is too large for a page. Raises BrokerError."""
        async with self._at_the_letters:
            known = self._opened.get((queue, id_))
            if known is None or time.monotonic() - known.asked > _STALE_LETTERS:
                found = await self._app.client.broker.dead_letters.read(
                    queue, limit=MOST_LETTERS, select=lambda one: _opened(one) if one.envelope.id == id_ else None
                )
                known = _Letters(found, time.monotonic(), len(found))
                self._opened[queue, id_] = known
                while len(self._opened) > _MOST_OPENED:
                    self._opened.popitem(last=False)
            return next(iter(known.letters), None)

    async def _read(self, queue: str) -> Sequence[DeadLetter]:
        return await self._app.client.broker.dead_letters.read(queue, limit=MOST_LETTERS, select=_listed)

    def forget(self) -> None:
        self._listed.clear()
        self._opened.clear()


def _listed(letter: DeadLetter) -> DeadLetter:
    """For a list: thousands of these are held."""
    envelope = msgspec.structs.replace(letter.envelope, body=b"", headers={}, last_error=None)
    return msgspec.structs.replace(
        letter, envelope=envelope, reason=shorten(letter.reason, LISTED_REASON), traceback=""
    )


def _opened(letter: DeadLetter) -> DeadLetter:
    size = len(letter.envelope.body)
    if size <= _LARGEST_BODY:
        return letter
    told = f"({size} bytes, too large for a page: leveret dead show has it)".encode()
    return msgspec.structs.replace(letter, envelope=msgspec.structs.replace(letter.envelope, body=told))
