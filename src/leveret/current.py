"""The task that runs here and now, for its own code and for what is wrapped around it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.errors import LeveretError

if TYPE_CHECKING:
    from collections.abc import Sequence


class NoCurrentTask(LeveretError, RuntimeError):
    """`current_task` was called outside of a task."""


class CurrentTask(msgspec.Struct, frozen=True):
    """What a running task may know of itself. The id stays the same in every retry and redelivery."""

    id: str
    task: str
    queue: str
    #: 1 for the first run.
    attempt: int
    #: The attempt after which a failure is final; None: no limit.
    max_attempts: int | None
    #: Unix time when the task's ``timeout`` is over, seconds; None: it has none.
    deadline: float | None
    #: Unix time, seconds; None when the producer did not say.
    enqueued_at: float | None
    #: The message's other headers, as they came.
    headers: dict[str, Any]


#: Runs what is inside; returns what the task returned.
Inner: TypeAlias = Callable[[], Awaitable[Any]]
#: Wrapped around each run: awaits ``inner()`` once, and may do something before and after, and on an exception.
Middleware: TypeAlias = Callable[[CurrentTask, Inner], Awaitable[Any]]

_running: ContextVar[CurrentTask] = ContextVar("leveret_current_task")


def current_task() -> CurrentTask:
    """The task that this code runs in, in coroutines and threads alike. Raises NoCurrentTask outside of one."""
    try:
        return _running.get()
    except LookupError:
        raise NoCurrentTask("current_task() is for code that a worker runs as a task; here is none") from None


async def run_within(current: CurrentTask, middleware: Sequence[Middleware], inner: Inner) -> Any:
    """Run ``inner`` as the current task, the first middleware outermost."""
    for layer in reversed(middleware):
        inner = partial(layer, current, inner)
    token = _running.set(current)
    try:
        return await inner()
    finally:
        _running.reset(token)
