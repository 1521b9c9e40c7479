"""What arrives at a consumer, in one iterator."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self, TypeAlias

import msgspec

from leveret.model import CancelRequest, Delivery

if TYPE_CHECKING:
    from collections.abc import Iterable


class Deliveries(msgspec.Struct, frozen=True):
    """Tasks to run, at least one. After `Consumer.stop`: what was on its way, to be handed back."""

    deliveries: tuple[Delivery, ...]


class CancelRequests(msgspec.Struct, frozen=True):
    """Tasks that were cancelled, at least one: tasks that the consumer was dealt, and perhaps any other."""

    requests: tuple[CancelRequest, ...]


class Paused(msgspec.Struct, frozen=True):
    """Which of the consumer's queues are paused has changed. It starts with none."""

    #: All that are paused now. What came from them and has not begun should be handed back.
    queues: frozenset[str]


Arrival: TypeAlias = Deliveries | CancelRequests | Paused


class Inbox:
    """Gathers what arrives until it is read. Cancelled while it waits, a read takes nothing."""

    def __init__(self) -> None:
        #: The queues that are paused.
        self.paused: frozenset[str] = frozenset()
        self._told: frozenset[str] = frozenset()
        self._requests: list[CancelRequest] = []
        self._deliveries: list[Delivery] = []
        self._error: BaseException | None = None
        self._is_closed = False
        self._wake = asyncio.Event()

    @property
    def unread(self) -> int:
        """How many deliveries wait to be read."""
        return len(self._deliveries)

    def deliver(self, deliveries: Iterable[Delivery]) -> None:
        self._deliveries.extend(deliveries)
        self._wake.set()

    def cancel(self, requests: Iterable[CancelRequest]) -> None:
        self._requests.extend(requests)
        self._wake.set()

    def pause(self, queues: frozenset[str]) -> None:
        """These are paused now, and no others."""
        self.paused = queues
        self._wake.set()

    def drop_deliveries(self) -> None:
        """Those that were not read are not the consumer's any more."""
        self._deliveries.clear()

    def fail(self, error: BaseException) -> None:
        """Nothing more can arrive: raised when the rest is read."""
        self._error = error
        self._wake.set()

    def close(self) -> None:
        """The iteration ends."""
        self._is_closed = True
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Arrival:
        while (arrival := self._take()) is None:
            if self._is_closed:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        return arrival

    def _take(self) -> Arrival | None:
        """The next one. What keeps a task from running comes before the task."""
        if self._is_closed:
            return None
        if self._told != self.paused:
            self._told = self.paused
            return Paused(self._told)
        if self._requests:
            requests, self._requests = self._requests, []
            return CancelRequests(tuple(requests))
        if self._deliveries:
            deliveries, self._deliveries = self._deliveries, []
            return Deliveries(tuple(deliveries))
        return None
