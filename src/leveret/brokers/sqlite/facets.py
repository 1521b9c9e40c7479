"""What the SQLite broker is asked besides its core: queues, statuses, dead letters and workers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers.sqlite.consumer import sweep
from leveret.brokers.sqlite.identity import FileAway
from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.questions import ask
from leveret.brokers.sqlite.watcher import Watcher
from leveret.errors import QueueNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers.base import Select
    from leveret.brokers.feeds import Feed, Following, Watch
    from leveret.brokers.sqlite.store import Store
    from leveret.brokers.sqlite.wakeup import WakeUps
    from leveret.brokers.sqlite.writer import Writer
    from leveret.model import DeadLetter, QueueStats, Removed, Status, WorkerReport

T = TypeVar("T")

log = logging.getLogger("leveret.sqlite")


class File:
    """A file that may not be there yet: a question must not make it."""

    def __init__(self, writer: Writer, bells: WakeUps) -> None:
        self.writer = writer
        self.bells = bells

    async def look(self, work: Callable[[Store], T], nothing: T) -> T:
        """What is in the file; ``nothing`` where there is none."""
        return await self.writer.do(work) if self.writer.has_file else nothing

    async def change(self, queue: str, work: Callable[[Store], T]) -> T:
        """Change what must be there."""
        if not self.writer.has_file:
            raise QueueNotFound(f"queue {queue!r} does not exist: there is no file {self.writer.path}")
        return await self.writer.do(work)

    async def sweep(self) -> bool:
        """Remove the consumers whose process is gone; whether there is a file."""
        if not self.writer.has_file:
            return False
        await sweep(self.writer, self.bells)
        return True


class SQLiteQueues:
    """See `leveret.brokers.Queues`."""

    def __init__(self, file: File) -> None:
        self._file = file

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        del queues  # the file lists them all
        return await self._file.writer.do(lambda store: store.queues.stats()) if await self._file.sweep() else ()

    async def ready(self, queues: Sequence[str]) -> int:
        return await self._file.look(lambda store: store.queues.ready(queues), 0)

    async def pause(self, queue: str) -> None:
        await self._file.change(queue, lambda store: store.queues.set_paused(queue, paused=True))

    async def resume(self, queue: str) -> None:
        await self._file.change(queue, lambda store: store.queues.set_paused(queue, paused=False))

    async def purge(self, queue: str, *, force: bool = False) -> Removed:
        return await self._clear(queue, force=force, whole=False)

    async def delete(self, queue: str, *, force: bool = False) -> Removed:
        return await self._clear(queue, force=force, whole=True)

    async def _clear(self, queue: str, *, force: bool, whole: bool) -> Removed:
        await self._file.sweep()  # consumers whose process is gone do not use it
        return await self._file.change(queue, lambda store: store.queues.clear(queue, force=force, whole=whole))


class SQLiteStatuses:
    """See `leveret.brokers.Statuses`."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._watcher = Watcher(file.writer, file.bells)
        self._overseer = Watcher(file.writer, file.bells)
        #: Whether anybody wanted to know of every task when this program stored its last ones.
        self.is_watched = False

    async def notify(self, updates: Sequence[Status]) -> None:
        # A producer's are in the task's own row, and recorded only for who watches.
        told = [update for update in updates if self.is_watched or not update.first]
        if told:
            try:
                await self._file.writer.do(lambda store: store.records.note(told))
            except FileAway as error:  # who takes and who stores says so; the next update tells it all
                log.debug("%d updates are not told: %s", len(told), error)

    async def read(self, ids: Sequence[str]) -> Sequence[Status]:
        return await self._file.look(lambda store: store.records.statuses(ids), ())

    def follow(self, ids: Sequence[str]) -> Following[Feed]:
        return self._watcher.follow(ids)

    async def recent(self, limit: int) -> Sequence[Status]:
        return await self._file.look(lambda store: store.records.recent(limit), ())

    def watch(self) -> Following[Watch]:
        return self._overseer.watch()

    async def close(self) -> None:
        await self._watcher.close()
        await self._overseer.close()


class SQLiteDeadLetters:
    """See `leveret.brokers.DeadLetters`."""

    def __init__(self, file: File) -> None:
        self._file = file

    async def read(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        return await self._file.look(lambda store: store.dead_letters.found(queue, limit, select), ())

    async def retry(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._file.change(queue, lambda store: store.dead_letters.retry(queue, ids))

    async def drop(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        return await self._file.change(queue, lambda store: store.dead_letters.drop(queue, ids))


class SQLiteControl:
    """See `leveret.brokers.Control`."""

    def __init__(self, file: File) -> None:
        self._file = file

    async def cancel(self, id_: str) -> Status | None:
        return await self._file.look(lambda store: store.cancellations.cancel(id_), None)

    async def workers(self) -> Sequence[WorkerReport]:
        if not await self._file.sweep():
            return ()
        try:
            return await ask(self._file.writer, self._file.bells)
        except OSError as error:
            raise translate(error, self._file.writer.path) from error
