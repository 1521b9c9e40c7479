"""The task that runs here and now, for its own code and for what is wrapped around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Protocol

import msgspec

from leveret.errors import LeveretError, TaskCancelled
from leveret.model.status import Progress
from leveret.model.text import shorten

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    from typing_extensions import TypeVar  # type checkers have it; Python's own takes a default since 3.13

    from leveret.model.status import Status

    S = TypeVar("S", default=Any)
else:
    from typing import TypeVar

    S = TypeVar("S")

#: A longer note is cut in the middle (characters).
_MAX_NOTE = 1_000


class NoCurrentTask(LeveretError, RuntimeError):
    """`current_task` was called outside of a task."""


class Runtime(Protocol):
    """Between a running task and whoever runs it. Called from the task's thread, too."""

    #: Whether the asyncio task that runs it may be cancelled now: it awaits the user's code, and no thread.
    interruptible: bool

    def progressed(self, progress: Progress, /) -> None: ...
    def awaits(self, change: int, /) -> None:
        """It waits for so many more tasks that have not begun, or so many fewer."""

    @property
    def cancelled(self) -> bool: ...


class _NoLink:
    cancelled = False
    interruptible = False

    def progressed(self, progress: Progress) -> None:
        """Nobody listens."""

    def awaits(self, change: int) -> None:
        """Nobody listens."""


#: Of a task that runs without a worker.
NO_RUNTIME: Runtime = _NoLink()


class CurrentTask(msgspec.Struct, Generic[S], frozen=True):
    """What a running task may know of itself. The id stays the same in every retry and redelivery.

    Its parameter is the type of ``state``: ``task: CurrentTask[Pool] = current_task()``.
    """

    id: str
    task: str
    queue: str
    #: 1 for the first run.
    attempt: int
    #: The attempt after which a failure is final; None: no limit.
    max_attempts: int | None
    #: Unix time when the task's ``timeout`` is over, seconds; None: it has none.
    deadline: float | None
    #: Unix time, seconds; None when the producer did not say. Of a dead letter that was put back: when it was.
    enqueued_at: float | None
    #: The message's own headers, read-only: those of ``options(headers=...)``, or what a foreign producer sent.
    headers: Mapping[str, Any]
    #: The instant for which a schedule enqueued it, in UTC, however late it runs; None: no schedule did.
    scheduled_for: datetime | None = None
    #: What the application's lifespan has yielded in this process; None: it has none.
    state: S = None  # type: ignore[assignment]
    _link: Runtime = NO_RUNTIME

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Tell those who follow the task how far it is, from coroutines and threads alike. It never waits.

        What is told in quick succession may come as one.

        Args:
            done: How much is done, in any unit.
            total: How much there is to do, in the same unit. None: not known.
            note: A text for people. One over 1000 characters is cut in the middle.

        Raises:
            ValueError: A number is not finite.
        """
        try:
            known = Progress(_finite(done), None if total is None else _finite(total), shorten(str(note), _MAX_NOTE))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"progress({done!r}, {total!r}): the numbers must be finite") from None
        self._link.progressed(known)

    @property
    def link(self) -> Runtime:
        """To whoever runs it; for Leveret itself."""
        return self._link

    @property
    def cancelled(self) -> bool:
        """Whether somebody wants the task to end. An ``async def`` task is cancelled besides."""
        return self._link.cancelled

    def check(self) -> None:
        """End a plain ``def`` task that somebody has cancelled: call it now and then.

        Raises:
            TaskCancelled: Somebody wants the task to end.
        """
        if self.cancelled:
            raise TaskCancelled(f"task {self.task!r} {self.id} was cancelled while it ran")


def _finite(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(number)
    return number


#: The task that this code runs in.
running: ContextVar[CurrentTask] = ContextVar("leveret_current_task")


def current_task() -> CurrentTask[Any]:
    """The task that this code runs in, in coroutines and threads alike.

    Returns:
        What the task may know of itself.

    Raises:
        NoCurrentTask: This code does not run in a task.
    """
    try:
        return running.get()
    except LookupError:
        raise NoCurrentTask("current_task() is for code that a worker runs as a task; here is none") from None


def awaited(
    feed: AbstractAsyncContextManager[AsyncIterable[Sequence[Status]]], ids: Iterable[str]
) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]:
    """A feed of these tasks, of which whoever runs the current task knows, if there is one: it waits for them."""
    current = running.get(None)
    return _Awaited(feed, ids, NO_RUNTIME if current is None else current._link)  # noqa: SLF001 - one module


class _Awaited:
    """No generator: whoever follows may be cancelled at any moment."""

    def __init__(
        self, feed: AbstractAsyncContextManager[AsyncIterable[Sequence[Status]]], ids: Iterable[str], link: Runtime
    ) -> None:
        self._feed = feed
        self._link = link
        #: Those of the tasks that have not begun, as far as is known.
        self._waiting = set(ids)

    async def __aenter__(self) -> Self:
        self._batches = aiter(await self._feed.__aenter__())
        self._link.awaits(len(self._waiting))
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        self._link.awaits(-len(self._waiting))
        return await self._feed.__aexit__(*error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Status]:
        batch = await anext(self._batches)
        before = len(self._waiting)
        for status in batch:
            if status.is_final or status.state == "running":
                self._waiting.discard(status.id)
            else:
                self._waiting.add(status.id)
        if len(self._waiting) != before:
            self._link.awaits(len(self._waiting) - before)
        return batch
