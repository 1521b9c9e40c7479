"""``asyncio.timeout`` for many operations of one length: one timer of the loop for all that run, not one for each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class Deadlines:
    """Of one loop, all ``seconds`` long, so that they fall due in the order in which they began."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        #: When each is due (the loop's time), the first one first.
        self._running: dict[Deadline, float] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Deadline:
        """To be entered at once: ``with deadlines.begin():``. When it is over, the block raises TimeoutError."""
        return Deadline(self)

    def add(self, deadline: Deadline) -> None:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        when = loop.time() + self.seconds
        self._running[deadline] = when
        if self._timer is None:
            self._timer = loop.call_at(when, self._expire, loop)

    def remove(self, deadline: Deadline) -> None:
        # The timer stays: to find nothing due, once in ``seconds``, costs less than to cancel one for each operation.
        self._running.pop(deadline, None)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for deadline, when in list(self._running.items()):
            if when > now:
                self._timer = loop.call_at(when, self._expire, loop)
                return
            del self._running[deadline]
            deadline.expire()


class Deadline:
    """One operation's; it cancels the task that entered it, as ``asyncio.timeout`` does."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._expired = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a deadline needs a task, which it can cancel")
        self._task = task
        self._cancelling = task.cancelling()
        self._deadlines.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._deadlines.remove(self)
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def expire(self) -> None:
        self._expired = True
        self._task.cancel()
