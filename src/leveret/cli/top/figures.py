"""What there is to show: asked of the broker, and counted from the news of tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers import QueueNames
from leveret.errors import LeveretError
from leveret.model import LimitUse, QueueStats, ScheduleRow, Status, WorkerReport, newer
from leveret.observe import QueueRates, Rate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    from leveret.brokers import Broker

#: So many failures are kept, and looked for at the beginning among so many tasks.
_FAILURES = 100
_LOOK_BACK = 200
#: There may be thousands of schedules, and limits: they are asked for less often (seconds).
_ROWS_AFTER = 5.0


class Figures(msgspec.Struct, frozen=True):
    """All that is shown, of one moment."""

    at: float
    queues: Sequence[QueueStats]
    rates: dict[str, Rate]
    workers: Sequence[WorkerReport]
    #: The latest first: dead, or to be tried again.
    failures: Sequence[Status]
    schedules: Sequence[ScheduleRow] = ()
    limits: Sequence[LimitUse] = ()

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What the cursor can be on: kind and key, from top to bottom."""
        runs = [("run", run.id) for one in self.workers for child in one.children for run in child.running]
        rows = [("queue", one.name) for one in self.queues] + runs + [("failure", one.id) for one in self.failures]
        return list(dict.fromkeys(rows))  # a task may run twice, where a worker was thought to be gone

    def failure(self, id_: str) -> Status | None:
        return next((one for one in self.failures if one.id == id_), None)


class Collector:
    """Asks the broker, and follows all tasks as long as it is open."""

    def __init__(self, broker: Broker, queues: Sequence[str]) -> None:
        self._broker = broker
        self._names = QueueNames(queues)
        self._failures: dict[str, Status] = {}
        self._rates = QueueRates()
        self._stack = AsyncExitStack()
        self._following: asyncio.Task[None] | None = None
        self._schedules: Sequence[ScheduleRow] = ()
        self._limits: Sequence[LimitUse] = ()

    async def __aenter__(self) -> Self:
        try:
            updates = await self._stack.enter_async_context(self._broker.statuses.watch())
            for status in reversed(await self._broker.statuses.recent(_LOOK_BACK)):
                self._note(status)
            self._following = asyncio.get_running_loop().create_task(self._follow(updates))
            self._stack.push_async_callback(_ended, self._following)
            await self._ask_for_rows()
            asking = asyncio.get_running_loop().create_task(self._ask_now_and_then())
            self._stack.push_async_callback(_ended, asking)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def look(self) -> Figures:
        """Raises BrokerError."""
        if self._following is not None and self._following.done():
            self._following.result()
        queues, workers = await asyncio.gather(self._names.stats(self._broker), self._broker.control.workers())
        now = time.time()
        return Figures(
            now,
            queues,
            self._rates.look(now, queues),
            sorted(workers, key=lambda worker: worker.name),
            list(reversed(self._failures.values())),
            self._schedules,
            self._limits,
        )

    async def _ask_now_and_then(self) -> None:
        """Beside the rest, which waits for no answer of whoever keeps schedules and limits."""
        asking = asyncio.current_task()
        # An answer that fails in the moment of the cancellation must not hide it.
        while asking is not None and not asking.cancelling():
            await asyncio.sleep(_ROWS_AFTER)
            await self._ask_for_rows()

    async def _ask_for_rows(self) -> None:
        with suppress(LeveretError):
            self._schedules = await self._broker.schedules.read()
        with suppress(LeveretError):
            self._limits = await self._broker.limits.read()

    async def _follow(self, updates: AsyncIterator[Sequence[Status]]) -> None:
        async for batch in updates:
            for update in batch:
                if update.is_final:
                    self._rates.ended(update.queue)
                self._note(update)

    def _note(self, update: Status) -> None:
        """The latest failure stands last; a task that did well after all, or is put back, is none."""
        self._names.hear([update.queue])
        if update.state == "running":
            return  # the attempt that failed is still the last one known
        status = newer(self._failures.pop(update.id, None), update)
        if status.state in ("dead", "retrying"):
            self._failures[update.id] = status
            if len(self._failures) > _FAILURES:
                del self._failures[next(iter(self._failures))]


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
