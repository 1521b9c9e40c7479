"""``Handle[R]``: one task that was enqueued, and what has become of it."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import msgspec

from leveret.errors import (
    ConfigurationError,
    NoResult,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
    TaskNotFound,
)
from leveret.model import Status, arguments

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta


R = TypeVar("R")

#: How long `Handle.cancel` waits for a running task to end (seconds).
CANCEL_TIMEOUT = 5.0
#: For so long a task may be unknown because its enqueue, perhaps in another program, is on its way (seconds).
UNKNOWN = 3.0


class Source(Protocol):
    """Where a handle asks: its application."""

    @property
    def keep_results(self) -> float: ...

    async def statuses(self, ids: Sequence[str], /) -> Sequence[Status]: ...
    def follow(self, ids: Sequence[str], /) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]: ...
    def on_their_way(self, ids: Collection[str], /) -> frozenset[str]: ...
    async def cancel(self, id_: str, /) -> Status | None: ...
    def restore(self, task: str | None, queue: str, result: msgspec.Raw, /) -> Any: ...


class Handle(msgspec.Struct, Generic[R], eq=False, weakref=True):
    """A task that is safely stored: its id, and where it was put as far as this program knows.

    ``Task.enqueue``, ``Task.handle`` and ``App.handle`` make it.
    """

    #: The task's id, the same in every attempt.
    id: str
    _source: Source
    #: The task's name; None: this program does not know it.
    task: str | None = None
    #: The queue; None: this program did not enqueue the task.
    queue: str | None = None
    _stored: bool = True
    #: When this program stored the task itself (Unix time).
    _stored_at: float | None = None
    #: The broker was asked, and knew nothing of it.
    _is_unknown: bool = False
    _last: Status | None = None
    #: The task was there before: its unique key is the same, and this enqueue stored nothing.
    existing: bool = False

    def __repr__(self) -> str:
        return f"<Handle {self.id} of {self.task or 'a task'}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Handle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    async def status(self) -> Status:
        """What is known of the task now.

        Returns:
            The task's state, attempt, times, progress and error.

        Raises:
            TaskNotFound: The broker knows nothing of the task.
            BrokerError: The broker cannot be asked.
        """
        known = self._last
        # A dead letter may have been put back.
        if known is None or not known.is_final or known.state == "dead":
            found = await self._source.statuses([self.id])
            if not found and (known is None or not known.is_final):
                raise TaskNotFound(_unknown([self.id]))
            known = self._last = found[0] if found else known
        assert known is not None
        return known

    async def result(self, timeout: float | timedelta | None = None) -> R:
        """Wait until the task has ended, and give what it returned. Ask within the application's ``keep_results``.

        Args:
            timeout: How long to wait (seconds, or a timedelta). None: as long as it takes.

        Returns:
            What the task returned, as its annotation says.

        Raises:
            TaskFailed: The task is dead.
            TaskCancelled: The task was cancelled.
            NoResult: The task succeeded, but what it returned could not be kept.
            NotSerializable: What the task returned does not fit its annotation: another version of the task returned
                it.
            ResultTimeout: The task had not ended in time, and goes on; or nothing was heard of it.
            TaskNotFound: Nothing is known of the task.
            ConfigurationError: The task has ``store_result=False``, or ``timeout`` is no duration.
            BrokerError: The broker cannot be asked.
        """
        seconds = arguments.timeout(timeout)
        self.check_stored()
        status: Status | None = None
        try:
            async with asyncio.timeout(seconds) as limit, aclosing(self.updates()) as updates:
                async for status in updates:
                    if status.is_final:
                        return self.result_in(status)
        except TimeoutError as error:
            if not limit.expired():
                raise
            if self._is_unknown and not self._source.on_their_way([self.id]):
                raise TaskNotFound(_unknown([self.id])) from error
            if status is None and self._doubtful_ids():
                raise ResultTimeout(
                    f"nothing was heard of task {self.id} within {seconds:.15g} s, not even whether there is one; "
                    "wait longer"
                ) from error
            raise ResultTimeout(f"task {self.id} had not ended after {seconds:.15g} s; it goes on") from error
        raise AssertionError("a feed ends with a final status")

    async def updates(self) -> AsyncGenerator[Status]:
        """Follow the task: what is known now, and then each change, to the final one.

        Yields:
            The status after each change. Quick changes may come as one.

        Raises:
            TaskNotFound: Nothing is known of the task, and nothing comes within ``UNKNOWN`` (3 seconds), in which its
                enqueue may be on its way.
            ConfigurationError: The task has ``store_result=False``.
            BrokerError: The broker cannot be asked.
        """
        self.check_stored()
        if self._last is not None and self._last.is_final:
            known = await self.status()
            if known.is_final:
                yield known
                return
        async with self._source.follow([self.id]) as feed:
            news = _News(self._source, feed, self._doubtful_ids())
            while True:
                self._is_unknown = news.lacks_some
                for status in await news.next():
                    self._last = status
                    self._is_unknown = False
                    yield status
                    if status.is_final:
                        return

    async def cancel(self, *, timeout: float | timedelta = CANCEL_TIMEOUT) -> Status:
        """Have the task not run, or end if it runs; the status then tells what came of it.

        An ``async def`` task is cancelled where it awaits. A plain ``def`` one ends at its next
        ``current_task().check()``, or is killed a while after its own ``timeout``; nothing else ends it. A cancelled
        task is no dead letter, and is not tried again.

        Args:
            timeout: How long to wait for a running task to end (seconds, or a timedelta).

        Returns:
            The status. With ``cancelled`` the task never runs, or it ended because of this. With ``succeeded`` or
            ``dead`` it was too late. With any other state the task still runs after ``timeout``.

        Raises:
            TaskNotFound: Nothing is known of the task. If it waits, it will not run all the same.
            ConfigurationError: ``timeout`` is no duration.
            BrokerError: The broker cannot be asked.
        """
        seconds = arguments.seconds("timeout", timeout)
        status = await self._source.cancel(self.id)
        if status is not None and (status.is_final or not self._stored):
            self._last = status
            return status
        if not self._stored:
            raise TaskNotFound(
                f"nothing is known of task {self.id!r}, whose result is not stored (store_result=False); "
                "if it waits, it will not run, and if it runs, it is told to end"
            )
        try:
            async with asyncio.timeout(seconds), aclosing(self.updates()) as updates:
                async for update in updates:
                    status = update
        except (TimeoutError, TaskNotFound):
            if status is None:
                raise TaskNotFound(f"nothing is known of task {self.id!r}; if it waits, it will not run") from None
        assert status is not None
        return status

    def result_in(self, status: Status) -> R:
        """The result in a final status.

        Args:
            status: The task's final status.

        Returns:
            What the task returned, as its annotation says.

        Raises:
            TaskFailed: The task is dead.
            TaskCancelled: The task was cancelled.
            NoResult: The task succeeded, and its result was not kept.
            NotSerializable: What the task returned does not fit its annotation.
        """
        if status.state == "dead":
            raise TaskFailed(self.id, status.task, status.error or "", status.traceback)
        if status.state == "cancelled":
            raise TaskCancelled(f"task {status.task or '(default task)'} {self.id} was cancelled: {status.error}")
        if not status.has_result:
            raise NoResult(status.problem or f"task {self.id} succeeded, and its result is not stored")
        result: R = self._source.restore(status.task, status.queue, status.encoded_result)
        return result

    def _doubtful_ids(self) -> Sequence[str]:
        """Its id, unless this program knows that there is such a task."""
        is_certain = self._stored_at is not None and time.time() - self._stored_at < self._source.keep_results
        return [] if is_certain else [self.id]

    def check_stored(self) -> None:
        """Raises ConfigurationError: nobody can ask what became of the task. For Leveret itself."""
        if not self._stored:
            raise ConfigurationError(f"task {self.task!r} has store_result=False: nobody can ask what became of it")


async def as_finished(
    handles: Iterable[Handle[R]], *, timeout: float | timedelta | None = None
) -> AsyncGenerator[Handle[R]]:
    """Give the handles in the order in which their tasks end: ``async for handle in as_finished(handles)``.

    Args:
        handles: The tasks to wait for, of one application or of several.
        timeout: How long to wait for all of them together (seconds, or a timedelta). None: as long as it takes.

    Yields:
        The handle of the task that has ended; its ``result()`` is there then.

    Raises:
        ResultTimeout: Some had not ended in time. Those that there are go on.
        TaskNotFound: Nothing is known of one of them.
        ConfigurationError: One of them has ``store_result=False``, or ``timeout`` is no duration.
        BrokerError: The broker cannot be asked.
    """
    seconds = arguments.timeout(timeout)
    waiting: dict[str, list[Handle[R]]] = {}
    by_source: dict[Source, list[str]] = {}
    doubtful: list[str] = []
    for handle in handles:
        handle.check_stored()
        if handle.id not in waiting:
            by_source.setdefault(handle._source, []).append(handle.id)  # noqa: SLF001
            doubtful += handle._doubtful_ids()  # noqa: SLF001
        waiting.setdefault(handle.id, []).append(handle)
    news: asyncio.Queue[Status | BaseException] = asyncio.Queue()
    following = [asyncio.ensure_future(_follow(source, ids, doubtful, news)) for source, ids in by_source.items()]
    clock = asyncio.get_running_loop().time
    deadline = None if seconds is None else clock() + seconds
    try:
        while waiting:
            status = await _next(news, deadline, len(waiting))
            for handle in waiting.pop(status.id, []):
                handle._last = status  # noqa: SLF001
                yield handle
    finally:
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def gather_results(handles: Iterable[Handle[R]], *, timeout: float | timedelta | None = None) -> list[R]:
    """Wait for all the tasks, and give what they returned. The others go on when one has failed.

    Args:
        handles: The tasks to wait for, of one application or of several.
        timeout: How long to wait for all of them together (seconds, or a timedelta). None: as long as it takes.

    Returns:
        The results, in the order of the handles.

    Raises:
        ResultError: What the first one that failed raises: TaskFailed, TaskCancelled or NoResult. Or ResultTimeout or
            TaskNotFound, as with ``Handle.result``.
        ConfigurationError: One of them has ``store_result=False``, or ``timeout`` is no duration.
        BrokerError: The broker cannot be asked.
    """
    every = list(handles)
    results: dict[str, R] = {}
    async with aclosing(as_finished(every, timeout=timeout)) as finished:
        async for handle in finished:
            results[handle.id] = await handle.result()
    return [results[handle.id] for handle in every]


class _News:
    """A feed that is read until nothing is known of a doubtful task though its enqueue has had the time to come."""

    def __init__(self, source: Source, feed: AsyncIterator[Sequence[Status]], doubtful: Iterable[str]) -> None:
        self._source = source
        self._feed = feed
        self._unknown = set(doubtful)
        self._clock = asyncio.get_running_loop().time
        self._deadline = self._clock() + UNKNOWN

    @property
    def lacks_some(self) -> bool:
        """Whether nothing has come yet of some of the tasks."""
        return bool(self._unknown)

    async def next(self) -> Sequence[Status]:
        """What comes next. Raises TaskNotFound."""
        while True:
            try:
                async with asyncio.timeout_at(self._deadline if self._unknown else None) as limit:
                    batch = await anext(self._feed)
            except TimeoutError:
                if not limit.expired():
                    raise
                await self._look()
            else:
                self._unknown.difference_update(status.id for status in batch)
                return batch

    async def _look(self) -> None:
        # Before and after: what is stored while the question is on its way may be too late for the answer.
        coming = self._source.on_their_way(self._unknown)
        known = {status.id for status in await self._source.statuses(list(self._unknown))}
        lost = self._unknown - known - coming - self._source.on_their_way(self._unknown)
        if lost:
            raise TaskNotFound(_unknown(sorted(lost)))
        self._deadline = self._clock() + UNKNOWN


def _unknown(ids: Sequence[str]) -> str:
    named = f"task {ids[0]!r}" if len(ids) == 1 else f"{len(ids)} tasks, {ids[0]!r} among them"
    return (
        f"nothing is known of {named}: not enqueued here, its result is not stored (store_result=False), or was kept "
        "long enough (App(keep_results=...))"
    )


async def _next(news: asyncio.Queue[Status | BaseException], deadline: float | None, left: int) -> Status:
    try:
        async with asyncio.timeout_at(deadline):
            status = await news.get()
    except TimeoutError as error:
        raise ResultTimeout(f"{left} tasks had not ended in time; those that there are go on") from error
    if isinstance(status, BaseException):
        raise status
    return status


async def _follow(
    source: Source, ids: Sequence[str], doubtful: Sequence[str], news: asyncio.Queue[Status | BaseException]
) -> None:
    """Until all of these have ended. ``doubtful``: those that may not exist."""
    left = set(ids)
    try:
        async with source.follow(ids) as feed:
            fresh = _News(source, feed, left.intersection(doubtful))
            while left:
                for status in await fresh.next():
                    if status.is_final and status.id in left:
                        left.discard(status.id)
                        news.put_nowait(status)
    except Exception as error:  # noqa: BLE001 - it is raised where the news are read
        news.put_nowait(error)
