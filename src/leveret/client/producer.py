"""What enqueues on one event loop: its broker, and the queues that were declared there."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.brokers import Broker, Deadlines, Flights
from leveret.errors import BrokerError, BrokerUnavailable
from leveret.model import Queue, enqueued
from leveret.model.suggest import did_you_mean
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Iterator, Sequence

    from leveret.model import Envelope

log = logging.getLogger("leveret.app")

#: Rounds of a loop that a closing takes to be over.
_ROUNDS = 10
#: How much longer than its timeout an enqueue may take (seconds).
MORE = 1.0


class LoopProducer:
    """One loop's broker, and which queues it has declared."""

    def __init__(self, broker: Broker, queues: dict[str, Queue], deadlines: Deadlines, unknown: set[str]) -> None:
        self.broker = broker
        self._deadlines = deadlines
        self._warnings = LimitedLog(log)
        self.end = _closed_with_the_loop(broker, self._warnings)
        self._queues = queues
        self._declared: set[str] = set()
        self._declaring: Flights[str] = Flights()
        #: Why that was not possible when it was tried last.
        self._trouble: BrokerUnavailable | None = None
        self._unknown = unknown
        #: What is being stored and told of, by any key.
        self._sending: dict[int, Sequence[Envelope]] = {}

    async def declare(self) -> None:
        await self._declare(self._queues)

    async def publish(self, envelopes: Sequence[Envelope], *, notify: bool) -> None:
        stored, wanted = False, frozenset[str]()
        self._sending[id(envelopes)] = envelopes
        try:
            with self._deadlines.begin():
                wanted = frozenset(envelope.queue for envelope in envelopes) - self._declared
                if wanted:
                    await self._declare(wanted)
                await self.broker.publish(envelopes)
                stored = True
                if notify:
                    now = time.time()
                    await self.broker.statuses.notify([enqueued(envelope, now) for envelope in envelopes])
        except (BrokerError, TimeoutError) as error:
            if not stored and isinstance(error, TimeoutError) and wanted - self._declared:
                names = ", ".join(map(repr, sorted(wanted)))
                within = f"{self._deadlines.seconds - MORE:g} s"
                why = f"; the try before said: {self._trouble}" if self._trouble else ""
                raise BrokerUnavailable(
                    f"queue {names} could not be declared within {within}; nothing was stored{why}"
                ) from error
            if not stored:
                raise
            # No error: who got one would enqueue again what is stored, and it would run twice.
            self._warnings.warning(
                "%d tasks are stored, and those who watch are not told: %s",
                len(envelopes),
                str(error) or "it took too long",
            )
        finally:
            del self._sending[id(envelopes)]

    def on_their_way(self) -> Iterator[str]:
        """The ids of what is being stored now."""
        for envelopes in list(self._sending.values()):
            for envelope in envelopes:
                yield envelope.id

    async def _declare(self, names: Collection[str]) -> None:
        """Once, for however many want to enqueue there now."""
        await self._declaring.join(names, self._declare_now)

    async def _declare_now(self, names: Sequence[str]) -> None:
        try:
            await self.broker.declare([self._queues.get(name, Queue(name)) for name in names])
        except BrokerUnavailable as error:
            self._trouble = error
            raise
        self._trouble = None
        self._declared.update(names)
        for name in names:
            if name not in self._queues and name not in self._unknown:
                self._unknown.add(name)
                log.warning(
                    "queue %r is none of the application's, so its workers take nothing from it unless started with "
                    "-q; if that is meant, name it: App(queues=[Queue(%r)])%s",
                    name,
                    name,
                    did_you_mean(name, self._queues),
                )


def _closed_with_the_loop(broker: Broker, warnings: LimitedLog) -> AsyncGenerator[None]:
    """A generator that closes the broker when it ends: `asyncio.run` ends those that live when its program does.

    So a program that never closes its application ends without losing connections or warnings about them.
    """

    async def live() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await broker.close()
            warnings.flush()
            # The drivers' own callbacks of the closing run in the loop's next rounds.
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)

    generator = live()
    with suppress(StopIteration):
        generator.__anext__().send(None)  # its first step, in which the loop gets to know it, waits for nothing
    return generator
