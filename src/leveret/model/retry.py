"""When a failed attempt is tried again. Pure: policy, attempt, error and chance in; a delay, or never, out."""

from __future__ import annotations

import inspect
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.arguments import count, exceptions, seconds
from leveret.model.durations import MAX_DELAY, show
from leveret.model.signals import Retry

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_DELAY", "Decide", "RetryPolicy", "RetryRules", "leaves"]

#: Given the attempt that failed (1 for the first) and its exception: how long to wait (seconds, or a timedelta), or
#: None to give up.
Decide: TypeAlias = "Callable[[int, BaseException], float | timedelta | None]"


class RetryPolicy(msgspec.Struct, frozen=True, array_like=True):
    """How often a task is tried, and how long it waits between: exponential, with full jitter.

    The wait before attempt n + 1 is chance between nothing and ``backoff * 2 ** (n - 1)``, at most ``max_backoff``
    (seconds, or a timedelta), so that many tasks that failed together do not come back together. ``max_attempts=None``:
    for ever.
    """

    max_attempts: int | None = 5
    backoff: float = 15.0
    max_backoff: float = 600.0

    def __post_init__(self) -> None:
        if self.max_attempts is not None:
            msgspec.structs.force_setattr(
                self, "max_attempts", count("max_attempts", self.max_attempts, none="no limit")
            )
        msgspec.structs.force_setattr(self, "backoff", seconds("backoff", self.backoff))
        msgspec.structs.force_setattr(self, "max_backoff", seconds("max_backoff", self.max_backoff))

    def may_try_again(self, attempt: int) -> bool:
        """Whether another attempt may follow this one."""
        return self.max_attempts is None or attempt < self.max_attempts

    def next_try(self, attempt: int) -> float | str:
        """Seconds until the next try, or why there is none."""
        if not self.may_try_again(attempt):
            return f"attempt {attempt} of {self.max_attempts} failed"
        return self.delay(attempt, random.random())  # noqa: S311 - jitter

    def delay(self, attempt: int, chance: float) -> float:
        """Seconds until the next try; ``chance`` is from 0 to 1."""
        # 2 ** 60 times any backoff is beyond any cap; a float would overflow at 2 ** 1024.
        return chance * min(MAX_DELAY, self.max_backoff, self.backoff * 2.0 ** min(attempt - 1, 60))


class RetryRules(msgspec.Struct, frozen=True):
    """A policy, and what only the process that raised the exception can judge."""

    policy: RetryPolicy = RetryPolicy()
    #: Only these are tried again (None: every Exception)...
    retry_on: tuple[type[BaseException], ...] | None = None
    #: ... and these never.
    give_up_on: tuple[type[BaseException], ...] = ()
    #: Asked last; it overrides the policy's delay.
    decide: Decide | None = None

    def __post_init__(self) -> None:
        if self.retry_on is not None:
            msgspec.structs.force_setattr(self, "retry_on", exceptions("retry_on", self.retry_on))
        msgspec.structs.force_setattr(self, "give_up_on", exceptions("give_up_on", self.give_up_on))
        decide: object = self.decide
        if decide is not None and (not callable(decide) or inspect.iscoroutinefunction(decide)):
            raise ConfigurationError(
                f"retry is {show(self.decide)}; it must be a plain function of the attempt and the exception that "
                "returns the seconds to wait, or None to give up"
            )

    def next_try(self, attempt: int, error: BaseException, mistakes: list[BaseException] | None = None) -> float | str:
        """Seconds until the next try, or why there is none.

        An exception group is judged by what is in it: it is tried again if each part would be, after the longest of
        their waits. ``mistakes``: takes what the user's own code raised here, in whose place the policy decides.
        """
        parts = leaves(error)
        asking = [one for one in parts if isinstance(one, Retry)]
        failed = [one for one in parts if not isinstance(one, Retry)]
        for one in failed:
            kind = type(one).__name__
            if isinstance(one, self.give_up_on) or isinstance(error, self.give_up_on):
                return f"{kind} is not tried again (give_up_on)"
            if self.retry_on is not None and not (isinstance(one, self.retry_on) or isinstance(error, self.retry_on)):
                return f"{kind} is not tried again (not in retry_on)"
        planned = self.policy.next_try(attempt)
        if isinstance(planned, str):
            return planned
        waits = [_asked(one, planned, mistakes) for one in asking]
        for one in failed:
            wait = self._decided(attempt, one, planned, mistakes)
            if wait is None:
                return f"the task's retry rule gave up on {type(one).__name__}"
            waits.append(wait)
        return max(waits)

    def _decided(
        self, attempt: int, error: BaseException, planned: float, mistakes: list[BaseException] | None
    ) -> float | None:
        """What the rules say of one exception; None to give up."""
        if self.decide is None:
            return planned
        try:
            delay = self.decide(attempt, error)
            return None if delay is None else _wait(delay, "what the task's retry rule returned")
        except BaseException as mistake:  # noqa: BLE001 - it is the user's code
            _note(mistake, mistakes)
            return planned


def leaves(error: BaseException) -> list[BaseException]:
    """What is in an exception group, at any depth, each once; any other exception itself."""
    found: list[BaseException] = []
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, BaseExceptionGroup):
            # The attribute itself: a subclass's property of the same name may return anything.
            waiting.extend(reversed(vars(BaseExceptionGroup)["exceptions"].__get__(one)))
        else:
            found.append(one)
    return found


def _asked(error: Retry, planned: float, mistakes: list[BaseException] | None) -> float:
    """What a task asked for: its ``delay``, which a subclass may set to anything. None leaves it to the policy."""
    try:
        delay: Any = getattr(error, "delay", 0.0)
        return planned if delay is None else _wait(delay, f"{type(error).__name__}.delay")
    except BaseException as mistake:  # noqa: BLE001 - a property may raise anything
        _note(mistake, mistakes)
        return planned


def _wait(value: Any, what: str) -> float:
    """A wait that a broker can store: what has passed already is none, and what is endless is a year."""
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(number, bool) and isinstance(number, (int, float)) and number == number:
        number = min(max(number, 0.0), MAX_DELAY)
    return seconds(what, number, most=MAX_DELAY)


def _note(mistake: BaseException, mistakes: list[BaseException] | None) -> None:
    if mistakes is None:
        raise mistake
    mistakes.append(mistake)
