"""What a task raises to say how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from leveret.errors import ConfigurationError
from leveret.model.durations import MAX_DELAY, NotADuration, parse_seconds, show

if TYPE_CHECKING:
    from datetime import timedelta


class Dead(Exception):
    """Raise it in a task to give the task up for good: it becomes a dead letter with this reason."""

    # Errors and tracebacks name it as users import it.
    __module__ = "leveret"


class Retry(Exception):
    """Raise it in a task to have the task tried again. It is an attempt.

    Args:
        reason: Why, for the status and the log.
        delay: How long to wait before the next attempt (seconds, or a timedelta), at most a year.

    Raises:
        ConfigurationError: ``delay`` is no duration, or over a year.
    """

    __module__ = "leveret"

    def __init__(self, reason: str = "the task asked to be tried again", *, delay: float | timedelta = 0.0) -> None:
        super().__init__(reason)
        try:
            self.delay = parse_seconds(delay, most=MAX_DELAY)
        except NotADuration as problem:
            raise ConfigurationError(f"Retry(delay={show(delay)}): {problem}") from None


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class Limited(Exception):
    """Raise it in a task when a service wants fewer calls (HTTP 429): nothing of the limit starts for a while.

    The task waits for its limits again, and this was no attempt. With a key, it is that key's tasks that wait.

    Args:
        limit: The limit, or its name: one of the task's own, or that of its queue (``"queue:NAME"``).
        for_: For how long (seconds, or a timedelta), at most a year; what the service says in ``Retry-After``.
        reason: Why, for the log.

    Raises:
        ConfigurationError: ``limit`` is none, or ``for_`` is no duration, or over a year.
    """

    __module__ = "leveret"

    def __init__(self, limit: _Named | str, *, for_: float | timedelta, reason: str = "") -> None:
        name = limit if isinstance(limit, str) else getattr(limit, "name", None)
        if not isinstance(name, str):
            raise ConfigurationError(f"Limited({show(limit)}): it must be a limit of app.limit(...), or its name")
        try:
            self.delay = parse_seconds(for_, most=MAX_DELAY)
        except NotADuration as problem:
            raise ConfigurationError(f"Limited(for_={show(for_)}): {problem}") from None
        self.limit = name
        super().__init__(reason or f"limit {name!r} rests for {self.delay:g} s")
