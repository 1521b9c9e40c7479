"""What a task raises to say how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
