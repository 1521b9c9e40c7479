"""How a worker ends what it does: it is told to stop, and it waits for what runs beside it, or cancels that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine
    from typing import Any

    from leveret.executors import Executor

T = TypeVar("T")

#: Who has not ended is cancelled again after so long (seconds).
_AGAIN = 0.2


class Stop:
    """Whether the worker was told to stop, and whether it was told twice: then it stops at once."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._asked_twice = asyncio.Event()

    def ask(self) -> None:
        if self._asked.is_set():
            self._asked_twice.set()
        self._asked.set()

    def is_set(self) -> bool:
        return self._asked.is_set()

    async def wait(self) -> None:
        await self._asked.wait()

    async def wait_for_second(self) -> None:
        await self._asked_twice.wait()


async def ended(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended: a broker's driver may swallow a cancellation."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN)


class Background:
    """Starts coroutines as tasks. asyncio itself keeps only weak references to its tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def until_done(self) -> None:
        """Wait until nothing runs, what was started meanwhile included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, within: float) -> None:
        """Wait for what runs now, for so many seconds, and cancel what is left."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)
        self.cancel()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


async def first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def until_stopped(beginning: Coroutine[Any, Any, T], stop: Stop, executor: Executor) -> T | None:
    """What has begun, or None when the worker was stopped first: an import may hang, a broker may be away."""
    task = asyncio.create_task(beginning)
    stopped = asyncio.create_task(stop.wait())
    await first_of(task, stopped, executor.broken)
    stopped.cancel()
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.wait([task])
    if executor.broken.done():
        executor.broken.result()
    return None
