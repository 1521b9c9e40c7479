"""Operations that many callers want at once, and one does for all: one flight for each key."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine, Hashable, Sequence

K = TypeVar("K", bound="Hashable")
Operation: TypeAlias = "Callable[[Sequence[K]], Coroutine[Any, Any, None]]"


class _Flight(Generic[K]):
    """One run of an operation, and who waits for it."""

    def __init__(self, keys: Sequence[K], operation: Operation[K]) -> None:
        self.keys = frozenset(keys)
        #: Why it failed, once it has.
        self.error: BaseException | None = None
        self._is_over = False
        self._waiting: list[asyncio.Future[None]] = []
        self.task = asyncio.get_running_loop().create_task(operation(keys))
        self.task.add_done_callback(self._land)

    async def landed(self) -> None:
        """Wait for its end. A future for each who waits: to leave one that ten thousand wait on costs the same."""
        if not self._is_over:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            await waiting

    def _land(self, task: asyncio.Task[None]) -> None:
        self._is_over = True
        self.error = asyncio.CancelledError() if task.cancelled() else task.exception()
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)


class Flights(Generic[K]):
    """What runs now, by its keys. A caller that is cancelled leaves its flight running for the others."""

    def __init__(self) -> None:
        self._running: dict[K, _Flight[K]] = {}
        self._closed: Exception | None = None

    async def join(self, keys: Collection[K], operation: Operation[K]) -> None:
        """Have the operation be done for all keys: it begins for those that it does not run for yet.

        Raises what it raised. A flight that others began may have failed for keys of their own, or at the end of their
        time, so its failure is the caller's only when a later one fails too.
        """
        wanted = frozenset(keys)
        rest, is_first = wanted, True
        while True:
            self._raise_if_closed()
            mine = self._begin([key for key in keys if key in rest and key not in self._running], operation)
            flights = {self._running[key] for key in rest}
            for flight in flights:
                await flight.landed()
            failed = [flight for flight in flights if flight.error is not None]
            if not failed:
                return
            for flight in failed:
                if flight.error is not None and (flight is mine or (not is_first and flight.keys <= wanted)):
                    self._raise_if_closed()
                    raise flight.error
            rest = wanted & frozenset().union(*(flight.keys for flight in failed))
            is_first = False

    def close(self, error: Exception) -> None:
        """End what runs. Whoever waits, or comes later, gets this error."""
        self._closed = error
        for flight in list(self._running.values()):
            flight.task.cancel()

    def _raise_if_closed(self) -> None:
        if self._closed is not None:
            raise self._closed

    def _begin(self, keys: Sequence[K], operation: Operation[K]) -> _Flight[K] | None:
        if not keys:
            return None
        flight = _Flight(keys, operation)
        self._running.update(dict.fromkeys(keys, flight))
        # Behind the flight's own callback, and before whoever waited for it goes on.
        flight.task.add_done_callback(lambda _: self._forget(flight))
        return flight

    def _forget(self, flight: _Flight[K]) -> None:
        for key in flight.keys:
            if self._running.get(key) is flight:
                del self._running[key]
