"""What the SQLite broker is asked besides its core: queues, statuses, dead letters and workers."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers.base import no_limit, no_schedule
from leveret.brokers.sqlite.consumer import sweep
from leveret.brokers.sqlite.identity import FileAway
from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.questions import ask
from leveret.brokers.sqlite.watcher import Watcher
from leveret.errors import QueueNotFound
from leveret.model import Declare, DeclareLimits, Put

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from leveret.brokers.base import ScheduleKeeper, Select, WaitingState
    from leveret.brokers.feeds import Feed, Following, Watch
    from leveret.brokers.sqlite.store import Store
    from leveret.brokers.sqlite.wakeup import WakeUps
    from leveret.brokers.sqlite.writer import Writer
    from leveret.model import (
        Change,
        DeadLetter,
        Envelope,
        KeyHolder,
        LimitRequest,
        LimitUse,
        QueueStats,
        Removed,
        ScheduleRequest,
        ScheduleRow,
        Status,
        WorkerReport,
    )

T = TypeVar("T")

#: A keeper looks again after so long, whatever it knows of (seconds).
_LOOK = 1.0

log = logging.getLogger("leveret.sqlite")


class _File:
    """A file that may not be there yet: a question must not make it."""

    def __init__(self, writer: Writer, wake_ups: WakeUps) -> None:
        self._writer = writer
        self._wake_ups = wake_ups

    async def _look(self, work: Callable[[Store], T], nothing: T) -> T:
        """What is in the file; ``nothing`` where there is none."""
        return await self._writer.do(work) if self._writer.has_file else nothing

    async def _change(self, queue: str, work: Callable[[Store], T]) -> T:
        """Change, or look into, what must be there."""
        if not self._writer.has_file:
            raise QueueNotFound(f"queue {queue!r} does not exist: there is no file {self._writer.path}")
        return await self._writer.do(work)

    async def _sweep(self) -> bool:
        """Remove the consumers whose process is gone; whether there is a file."""
        if not self._writer.has_file:
            return False
        await sweep(self._writer, self._wake_ups)
        return True


class SQLiteQueues(_File):
    """See `leveret.brokers.Queues`."""

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        del queues  # the file lists them all
        return await self._writer.do(lambda store: store.queues.stats()) if await self._sweep() else ()

    async def ready(self, queues: Sequence[str]) -> int:
        return await self._look(lambda store: store.queues.ready(queues), 0)

    async def peek(self, queue: str, state: WaitingState, *, limit: int) -> Sequence[Envelope]:
        await self._sweep()  # what consumers had whose process is gone waits again
        return await self._change(queue, lambda store: store.queues.peek(queue, state, limit))

    async def pause(self, queue: str) -> None:
        await self._change(queue, lambda store: store.queues.set_paused(queue, paused=True))

    async def resume(self, queue: str) -> None:
        await self._change(queue, lambda store: store.queues.set_paused(queue, paused=False))

    async def purge(self, queue: str, *, force: bool = False) -> Removed:
        return await self._clear(queue, force=force, whole=False)

    async def delete(self, queue: str, *, force: bool = False) -> Removed:
        return await self._clear(queue, force=force, whole=True)

    async def _clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        await self._sweep()  # consumers whose process is gone do not use it
        return await self._change(queue, lambda store: store.queues.clear(queue, force=force, whole=whole))


class SQLiteStatuses(_File):
    """See `leveret.brokers.Statuses`."""

    def __init__(self, writer: Writer, wake_ups: WakeUps) -> None:
        super().__init__(writer, wake_ups)
        self._watcher = Watcher(writer, wake_ups)
        self._overseer = Watcher(writer, wake_ups)
        #: Whether anybody wanted to know of every task when this program stored its last ones.
        self.is_watched = False

    async def notify(self, updates: Sequence[Status]) -> None:
        # A producer's are in the task's own row, and recorded only for who watches.
        told = [update for update in updates if self.is_watched or not update.first]
        if told:
            try:
                await self._writer.do(lambda store: store.records.note(told))
            except FileAway as error:  # who takes and who stores says so; the next update tells it all
                log.debug("%d updates are not told: %s", len(told), error)

    async def read(self, ids: Sequence[str]) -> Sequence[Status]:
        return await self._look(lambda store: store.records.statuses(ids), ())

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        return self._watcher.follow(ids)

    async def recent(self, limit: int) -> Sequence[Status]:
        return await self._look(lambda store: store.records.recent(limit), ())

    def watch(self) -> Following[Watch]:
        return self._overseer.watch()

    async def close(self) -> None:
        await self._watcher.close()
        await self._overseer.close()


class SQLiteDeadLetters(_File):
    """See `leveret.brokers.DeadLetters`."""

    async def read(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        return await self._look(lambda store: store.dead_letters.found(queue, limit, select), ())

    async def retry(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._change(queue, lambda store: store.dead_letters.retry(queue, ids))

    async def drop(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._change(queue, lambda store: store.dead_letters.drop(queue, ids))


class SQLiteSchedules(_File):
    """See `leveret.brokers.Schedules` and `leveret.brokers.ScheduleKeeper`: each transaction is whole by itself."""

    async def read(self) -> Sequence[ScheduleRow]:
        return await self._look(lambda store: store.schedules.all(), ())

    async def ask(self, request: ScheduleRequest) -> Change:
        if not (self._writer.has_file or isinstance(request, (Put, Declare))):
            raise no_schedule(request)
        return await self._writer.do(lambda store: store.schedules.ask(request))

    @asynccontextmanager
    async def keep(self) -> AsyncGenerator[ScheduleKeeper]:
        yield self

    async def due(self) -> tuple[Sequence[ScheduleRow], float | None]:
        return await self._look(lambda store: store.schedules.due(), ((), None))

    async def advance(self, name: str, unfinished: Mapping[str, bool]) -> Change:
        return await self._writer.do(lambda store: store.schedules.advance(name, unfinished))

    async def wait(self, seconds: float) -> None:
        # Another program that changes a schedule tells nobody.
        await asyncio.sleep(min(seconds, _LOOK))


class SQLiteLimits(_File):
    """See `leveret.brokers.Limits`. What they let go is admitted in the transaction that deals it."""

    async def read(self) -> Sequence[LimitUse]:
        return await self._look(lambda store: store.limits.all(), ())

    async def ask(self, request: LimitRequest) -> None:
        if not (self._writer.has_file or isinstance(request, DeclareLimits)):
            raise no_limit(request)
        await self._writer.do(lambda store: store.limits.ask(request))

    @asynccontextmanager
    async def keep(self) -> AsyncGenerator[None]:
        yield


class SQLiteUniqueKeys(_File):
    """See `leveret.brokers.UniqueKeys`."""

    async def holders(self, limit: int) -> Sequence[KeyHolder]:
        return await self._look(lambda store: store.holders(limit), ())

    async def free(self, keys: Sequence[tuple[str, str]]) -> None:
        await self._look(lambda store: store.free(keys), None)

    async def release(self, key: str) -> str | None:
        return await self._look(lambda store: store.release(key), None)


class SQLiteControl(_File):
    """See `leveret.brokers.Control`."""

    async def cancel(self, id_: str) -> Status | None:
        return await self._look(lambda store: store.cancellations.cancel(id_), None)

    async def workers(self) -> Sequence[WorkerReport]:
        if not await self._sweep():
            return ()
        try:
            return await ask(self._writer, self._wake_ups)
        except OSError as error:
            raise translate(error, self._writer.path) from error
