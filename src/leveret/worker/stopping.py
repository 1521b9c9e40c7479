"""The stop of a worker, in two stages: what runs may finish within the grace, then what is left is handed back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from leveret.executors import Executor
    from leveret.worker.session import Session

T = TypeVar("T")

#: What is to be recorded when the worker ends may take so long (seconds).
SHUTDOWN_TIMEOUT = 5.0


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


async def finish_running(session: Session, stop: Stop, grace: float) -> None:
    """Wait until nothing runs that can end, the grace is over, or a second stop."""
    session.settler.flush()
    ends = (_all_settled(session), stop.wait_for_second(), session.awaiting.until_stuck())
    waits: list[asyncio.Task[None]] = [asyncio.create_task(end) for end in ends]
    await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _all_settled(session: Session) -> None:
    # After a stop no job begins, so nothing runs any more once nothing does.
    await session.jobs.until_none_begun()
    await session.background.until_done()


async def give_up(session: Session, executor: Executor) -> None:
    """End the executor and hand back what it still had; what can't be settled goes back with the consumer."""
    await executor.stop()
    session.settler.flush()
    session.settler.give_up(list(session.jobs.begun.values()))
    await session.background.close(SHUTDOWN_TIMEOUT)
