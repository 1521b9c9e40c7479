"""Dead letters: looked at, put back and deleted."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues import (
    Fetched,
    dead_letter_id,
    dead_queue,
    message_count,
    require_queue,
    revived_message,
    to_dead_letter,
)
from leveret.errors import EnqueueError, LeveretError
from leveret.model import freed_key, id_token, revived, revived_again, still

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence

    from leveret.brokers.base import Select
    from leveret.brokers.rabbitmq.amqp import Hosts, Incoming, Message
    from leveret.brokers.rabbitmq.coordination import Claims
    from leveret.brokers.rabbitmq.queues import DelayedPublisher, Publisher, Requester
    from leveret.brokers.rabbitmq.statuses import StatusLog
    from leveret.model import DeadLetter, Envelope, Status

T = TypeVar("T")

#: How long a look at dead letters may take: there may be many (seconds). A silent server is noticed by its heartbeat.
_LOOKING = 600.0
#: How many dead letters are put back at once.
_BATCH = 200
#: A worker tells that a task is dead before it has stored the dead letter: it may take so long, and it is looked for
#: so often (seconds).
_STORED_WITHIN = 10.0
_AGAIN = 0.2

log = logging.getLogger("leveret.rabbitmq")


class _Decided:
    """Ids of the dead letters that were seen, and of those that are put back or deleted."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.done: list[str] = []


class RabbitMQDeadLetters:
    """See `leveret.brokers.DeadLetters`."""

    def __init__(
        self,
        hosts: Hosts,
        publisher: Publisher,
        delayed: DelayedPublisher,
        requester: Requester,
        statuses: StatusLog,
        claims: Claims,
    ) -> None:
        self._hosts = hosts
        self._publisher = publisher
        self._delayed = delayed
        self._requester = requester
        self._statuses = statuses
        self._claims = claims

    async def read(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        return await self._requester.ask(
            "reading dead letters", lambda: self._read(queue, limit, select), limit=_LOOKING
        )

    async def retry(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        # A timeout for each batch: thousands may take long, and those that are put back stay so.
        limit = max(_LOOKING, self._requester.timeout * (1 + len(ids) / _BATCH))
        return await self._decide("reviving dead letters", partial(self._retry, queue), ids, limit)

    async def drop(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._decide("discarding dead letters", partial(self._drop, queue), ids, _LOOKING)

    async def _decide(
        self,
        doing: str,
        decide: Callable[[Sequence[str], _Decided], Coroutine[Any, Any, None]],
        ids: Sequence[str],
        limit: float,
    ) -> Sequence[str]:
        """Decide about dead letters, and later about those that are on their way to the queue. See `Requester.ask`."""
        decided = _Decided()
        await self._requester.ask(doing, partial(decide, ids, decided), limit=limit)
        while missing := await self._just_died([id_ for id_ in ids if id_ not in decided.seen]):
            await asyncio.sleep(_AGAIN)
            await self._requester.ask(doing, partial(decide, missing, decided), limit=limit)
        return decided.done

    async def _just_died(self, ids: Sequence[str]) -> list[str]:
        if not ids:
            return []
        now = time.time()
        return [status.id for status in await self._known_dead(ids) if now - status.at < _STORED_WITHIN]

    async def _read(self, queue: str, limit: int, select: Select | None) -> list[DeadLetter]:
        def keep(message: Incoming) -> tuple[float, DeadLetter | None]:
            letter = to_dead_letter(message, queue)
            return letter.died_at or 0.0, letter if select is None else select(letter)

        async with self._fetched(queue, limit, keep) as fetched:
            # Those that were not selected too: the limit is for what is looked through.
            oldest = sorted(fetched.kept, key=lambda kept: kept[0])[:limit]
            return [letter for _, letter in oldest if letter is not None]

    async def _retry(self, queue: str, ids: Sequence[str], decided: _Decided) -> None:
        """Put dead letters back, and note each as it is, since a later try does not see it again."""
        async with self._chosen(queue, ids) as (fetched, chosen):
            decided.seen.update(map(dead_letter_id, chosen))
            for start in range(0, len(chosen), _BATCH):
                now = time.time()
                keyed = [letter for one in chosen[start : start + _BATCH] if (letter := _keyed(one, queue, now))]
                # While another task has its unique key, a letter stays where it is.
                taken = await self._claims.claim(keyed, are_dead=True) if keyed else {}
                batch = [one for one in chosen[start : start + _BATCH] if dead_letter_id(one) not in taken]
                keyed = [letter for letter in keyed if letter.id not in taken]
                copies = [revived_message(message, queue, now) for message in batch]
                refusal: EnqueueError | None = None
                try:
                    # Before they are stored: a worker may have the first, and tell of it, before the last one is.
                    async with self._told_revived([dead_letter_id(message) for message in batch], now):
                        await self._claims.storing(keyed, partial(self._store, copies), are_dead=True)
                except EnqueueError as error:
                    refusal = error
                    batch = [message for message, copy in zip(batch, copies, strict=True) if copy.id not in error.ids]
                await fetched.remove(batch)
                decided.done += [dead_letter_id(message) for message in batch]
                if refusal is not None:
                    raise refusal

    async def _store(self, copies: Sequence[Message], _: Sequence[Envelope]) -> None:
        await self._delayed.publish(copies)

    @asynccontextmanager
    async def _told_revived(self, ids: Sequence[str], now: float) -> AsyncGenerator[None]:
        """Say that they wait again; of those that cannot be stored, that they are dead still."""
        dead = await self._known_dead(ids)
        await self._statuses.record([revived_again(status, now) for status in dead])
        try:
            yield
        except LeveretError as error:
            left = error.ids if isinstance(error, EnqueueError) else ids
            await self._statuses.record([still(status, time.time()) for status in dead if status.id in left])
            raise

    async def _known_dead(self, ids: Sequence[str]) -> list[Status]:
        try:
            return [status for status in await self._statuses.read(ids) if status.state == "dead"]
        except LeveretError as error:
            log.warning("the statuses of %d dead letters cannot be read: %s", len(ids), error)
            return []

    async def _drop(self, queue: str, ids: Sequence[str], decided: _Decided) -> None:
        async with self._chosen(queue, ids) as (fetched, chosen):
            await fetched.remove(chosen)
            await self._claims.dropped([to_dead_letter(message, queue).envelope for message in chosen])
            decided.seen.update(map(dead_letter_id, chosen))
            decided.done += map(dead_letter_id, chosen)

    @asynccontextmanager
    async def _chosen(self, queue: str, ids: Sequence[str]) -> AsyncGenerator[tuple[Fetched[Incoming], list[Incoming]]]:
        """Dead letters to decide about. Raises QueueNotFound."""
        wanted = frozenset(ids)

        def keep(message: Incoming) -> Incoming | None:
            return message if dead_letter_id(message) in wanted else None

        async with self._fetched(queue, None, keep) as fetched:
            if not fetched.count:
                await require_queue(await self._publisher.connection(), queue)
            yield fetched, fetched.kept

    @asynccontextmanager
    async def _fetched(
        self, queue: str, limit: int | None, keep: Callable[[Incoming], T | None]
    ) -> AsyncGenerator[Fetched[T]]:
        """Dead letters, the oldest first; those that are not removed go back to where they stood.

        ``keep``: what is kept of each; None: nothing.

        By a connection of its own: the publisher gives its one up when the server is silent, and dead letters of
        which it has stored copies would stay where they are, and be put back twice.
        """
        line = await amqp.Link.open(self._hosts, purpose="dead letters", confirms=False)
        try:
            count = await message_count(line.connection, dead_queue(queue))
            fetched = Fetched(line, dead_queue(queue), keep)
            if count is None:
                yield fetched
                return
            try:
                await fetched.take(limit, count[0])
                yield fetched
            finally:
                with suppress(*amqp.CONNECTION_LOST):  # they are back, then
                    await fetched.put_back(self._publisher)
        finally:
            await line.close()


def _keyed(message: Incoming, queue: str, now: float) -> Envelope | None:
    """The task that a dead letter becomes again, if it takes a unique key, or has an id of its producer's."""
    letter = revived(to_dead_letter(message, queue).envelope, now)
    return None if freed_key(letter.headers) is None and id_token(letter.headers) is None else letter
