"""Outcomes on their way into the file: those that come while others are being committed share a transaction."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.identity import FileAway
from leveret.brokers.sqlite.store import Settled, Store
from leveret.errors import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from leveret.brokers.sqlite.consumer import Lease
    from leveret.brokers.sqlite.writer import Writer
    from leveret.model import Settlement, Status


#: After a transaction with so many outcomes more are coming: the next waits for them for a moment (seconds), or until a
#: part of all that is out has come, so that nobody is idle until the credit is free again.
_MANY = 8
_GATHER = 0.005
_PART = 4
#: How often it is looked whether a file that is away is back (seconds).
_AWAY = 0.5


@dataclass(frozen=True, eq=False)
class _Call:
    """Outcomes of one lease, and who waits for them to be recorded: the ids that were lost."""

    lease: Lease
    settlements: Sequence[Settlement]
    updates: Sequence[Status]
    lost: asyncio.Future[list[str]]


class Settling:
    """Of one broker. One transaction at a time."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._waiting: list[_Call] = []
        self._count = 0
        self._leases: Iterable[Lease] = ()
        self._enough: asyncio.Future[None] | None = None
        self._committing: asyncio.Task[None] | None = None
        self._finishing = asyncio.Event()

    async def settle(
        self, lease: Lease, settlements: Sequence[Settlement], updates: Sequence[Status] = ()
    ) -> list[str]:
        """The ids of those that were not the lease's any more. Cancelled while it waits, it is not done at all."""
        call = _Call(lease, settlements, updates, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._count += len(settlements)
        if self._enough is not None and self._are_enough():
            self._stop_gathering()
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        return await call.lost

    async def finish(self) -> None:
        """Until all that waits is recorded, or refused; a file that is away is not waited for any more."""
        self._finishing.set()
        if self._committing is not None:
            await asyncio.wait([self._committing])

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                calls, self._waiting = self._waiting, []
                count, self._count = self._count, 0
                by_lease: dict[Lease, list[_Call]] = {}
                for call in calls:
                    if not call.lost.done():
                        by_lease.setdefault(call.lease, []).append(call)
                await asyncio.gather(*(self._commit(lease, mine) for lease, mine in by_lease.items()))
                self._leases = by_lease.keys()
                if count >= _MANY and not self._are_enough():
                    await self._gather()
        finally:
            self._committing = None

    async def _gather(self) -> None:
        loop = asyncio.get_running_loop()
        self._enough = loop.create_future()
        timer = loop.call_later(_GATHER, self._stop_gathering)
        await self._enough
        timer.cancel()

    def _stop_gathering(self) -> None:
        enough, self._enough = self._enough, None
        if enough is not None and not enough.done():
            enough.set_result(None)

    def _are_enough(self) -> bool:
        return self._count * _PART >= sum(lease.in_hand for lease in self._leases)

    async def _commit(self, lease: Lease, calls: list[_Call]) -> None:
        settled = [
            Settled(delivery.tag, delivery.envelope.id, outcome)
            for call in calls
            for delivery, outcome in call.settlements
        ]
        try:
            updates = [update for call in calls for update in call.updates]
            kept = await self._settled(lease, partial(Store.settle, settled=settled, updates=updates))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the callers'
            if len(calls) > 1 and not isinstance(error, BrokerUnavailable):
                # What cannot be stored must not keep its neighbours from it.
                for call in calls:
                    await self._commit(lease, [call])
                return
            for call in calls:
                if not call.lost.done():
                    call.lost.set_exception(error)
            return
        lease.unsettled -= len(kept)
        are_all_kept = len(kept) == len(settled)
        for call in calls:
            lost = [] if are_all_kept else _lost(call, kept)
            if not call.lost.done():
                call.lost.set_result(lost)

    async def _settled(self, lease: Lease, settle: Callable[..., set[int]]) -> set[int]:
        """The tokens that were the lease's still. While the file is away, nobody else can take what it holds."""
        while lease.held:
            try:
                return await self._writer.do(partial(settle, consumer=lease.consumer, wake_up=lease.wake_up))
            except FileAway:
                if self._finishing.is_set():
                    raise
                with suppress(TimeoutError):
                    async with asyncio.timeout(_AWAY):
                        await self._finishing.wait()
        return set()


def _lost(call: _Call, kept: set[int]) -> list[str]:
    """The ids that are not kept. What is kept is removed: whoever settles it again has not."""
    lost: list[str] = []
    for delivery, _ in call.settlements:
        if delivery.tag in kept:
            kept.remove(delivery.tag)
        else:
            lost.append(delivery.envelope.id)
    return lost
