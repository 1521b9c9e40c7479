"""Taking from the file: registered with a bell, woken when something is dealt, watching over the other consumers."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.store import Store
from leveret.errors import BrokerError
from leveret.model import Delivery, Queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from leveret.brokers.sqlite.bells import Bell, Bells
    from leveret.brokers.sqlite.writer import Writer
    from leveret.status import Mark

log = logging.getLogger("leveret.sqlite")

#: How often a consumer looks whether another one died, or a ring was lost with its ringer (seconds).
ROUND = 0.5


class Lease:
    """A consumer's right to what it was dealt. It ends with the consumer, never by time."""

    def __init__(self, consumer: int) -> None:
        self.consumer = consumer
        self.held = True


class SQLiteConsumer:
    """See `leveret.brokers.Consumer`."""

    def __init__(self, writer: Writer, bells: Bells, queues: Sequence[Queue], credit: int | None) -> None:
        self._writer = writer
        self._bells = bells
        self._queues = queues
        self._credit = credit
        self._paused: frozenset[str] = frozenset()
        self._told: frozenset[str] = frozenset()
        self._wake = asyncio.Event()
        self._known_marks: frozenset[Mark] = frozenset()
        self._new_marks: list[Mark] = []
        self._stopped = False
        self._newest = 0
        self._next_due: float | None = None
        self._next_round = 0.0
        self._lease = Lease(0)
        self._bell: Bell | None = None

    async def start(self) -> None:
        """Register; from now on tasks are dealt to this consumer."""
        await sweep(self._writer, self._bells)
        bell = self._bells.hang()
        try:
            number = await self._writer.do(
                partial(Store.register, bell=bell.name, queues=self._queues, credit=self._credit)
            )
        except BaseException:
            bell.take_down()
            raise
        self._bell, self._lease = bell, Lease(number)
        asyncio.get_running_loop().add_reader(bell.reader, self._rung)
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[Sequence[Delivery]]:
        while not self._stopped:
            batch = await self._next()
            before, self._told = self._told, self._paused
            if batch or before != self._told or self._new_marks:
                yield batch
        batch = await self._dealt()
        if batch:
            yield batch

    @property
    def hold_limit(self) -> None:
        return None

    def marks(self) -> Sequence[Mark]:
        marks, self._new_marks = self._new_marks, []
        return marks

    @property
    def paused(self) -> frozenset[str]:
        return self._paused

    async def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._wake.set()
            try:
                await self._writer.do(partial(Store.stop_taking, consumer=self._lease.consumer))
            except BrokerError as error:
                log.warning("this consumer may be dealt tasks until it has ended: %s", error)

    async def close(self) -> None:
        """Give back what is unsettled."""
        self._stopped = True
        self._lease.held = False
        self._let_go_of_bell()
        await self._writer.do(partial(Store.remove, consumers=[self._lease.consumer]))

    async def _next(self) -> Sequence[Delivery]:
        until_due = ROUND if self._next_due is None else self._next_due - time.time()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(ROUND, until_due))):
                await self._wake.wait()
        self._wake.clear()
        if time.monotonic() >= self._next_round:
            # By the clock, not when it is quiet: under steady load it never is.
            self._next_round = time.monotonic() + ROUND
            await self._look_around()
        return await self._dealt()

    async def _dealt(self) -> Sequence[Delivery]:
        try:
            dealt = await self._writer.do(partial(Store.dealt, consumer=self._lease.consumer, after=self._newest))
        except BrokerError as error:
            log.warning("cannot read tasks, trying again: %s", error)
            await asyncio.sleep(ROUND)
            return []
        if dealt is None:
            await self._renew()
            return []
        claims, self._next_due = dealt.claims, dealt.next_due
        self._paused = dealt.paused.intersection(queue.name for queue in self._queues)
        self._new_marks.extend(mark for mark in dealt.marks if mark not in self._known_marks)
        self._known_marks = frozenset(dealt.marks)
        if claims:
            self._newest = claims[-1].token
        return [Delivery(claim.envelope, self._lease, claim.token, claim.returns) for claim in claims]

    async def _look_around(self) -> None:
        with suppress(BrokerError, OSError):  # the next round tries again
            if self._bells.silent():
                await sweep(self._writer, self._bells)

    async def _renew(self) -> None:
        """Somebody removed this living consumer (its bell was deleted): what it had may run twice. Begin anew."""
        log.error("this consumer's registration is gone: was the folder beside the database deleted? registering again")
        self._lease.held = False
        self._let_go_of_bell()
        if self._stopped:
            return
        try:
            await self.start()
        except (BrokerError, OSError) as error:
            log.warning("this consumer cannot register, trying again: %s", error)
            await asyncio.sleep(ROUND)

    def _rung(self) -> None:
        if self._bell is not None:
            self._bell.hush()
        self._wake.set()

    def _let_go_of_bell(self) -> None:
        bell, self._bell = self._bell, None
        if bell is not None:
            asyncio.get_running_loop().remove_reader(bell.reader)
            bell.take_down()


async def sweep(writer: Writer, bells: Bells) -> None:
    """Give the tasks of consumers whose processes died to the others."""
    registered = await writer.do(Store.consumers)
    dead = [(number, bell) for number, bell in registered if not bells.is_held(bell)]
    if dead:
        await writer.do(partial(Store.remove, consumers=[number for number, _ in dead]))
        for _, bell in dead:
            bells.take_down(bell)
