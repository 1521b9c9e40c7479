"""When a failed attempt is tried again. Pure: policy, attempt, error and chance in; a delay, or never, out."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

#: A year, and a day for leap years: the longest that a task may wait (seconds).
MAX_DELAY = 366 * 86_400.0

#: Given the attempt that failed (1 for the first) and its exception: seconds until the next try, or None to give up.
Decide: TypeAlias = "Callable[[int, BaseException], float | None]"


class RetryPolicy(msgspec.Struct, frozen=True, array_like=True):
    """How often a task is tried, and how long it waits between: exponential, with full jitter.

    The wait before attempt n + 1 is chance between nothing and ``backoff * 2 ** (n - 1)``, at most ``max_backoff``
    (seconds), so that many tasks that failed together do not come back together. ``max_attempts=None``: for ever.
    """

    max_attempts: int | None = 5
    backoff: float = 15.0
    max_backoff: float = 600.0

    def __post_init__(self) -> None:
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ConfigurationError(
                f"max_attempts is {self.max_attempts}; it must be at least 1, or None for no limit"
            )
        if self.backoff < 0 or self.max_backoff < 0:
            raise ConfigurationError(
                f"backoff is {self.backoff} and max_backoff {self.max_backoff}; seconds cannot be negative"
            )

    def may_try_again(self, attempt: int) -> bool:
        """Whether another attempt may follow this one."""
        return self.max_attempts is None or attempt < self.max_attempts

    def delay(self, attempt: int, chance: float) -> float:
        """Seconds until the next try; ``chance`` is from 0 to 1."""
        # 2 ** 60 times any backoff is beyond any cap; a float would overflow at 2 ** 1024.
        return chance * min(self.max_backoff, self.backoff * 2.0 ** min(attempt - 1, 60))


class RetryRules(msgspec.Struct, frozen=True):
    """A policy, and what only the process that raised the exception can judge."""

    policy: RetryPolicy = RetryPolicy()
    #: Only these are tried again (None: every Exception)...
    retry_on: tuple[type[BaseException], ...] | None = None
    #: ... and these never.
    give_up_on: tuple[type[BaseException], ...] = ()
    #: Asked last; it overrides the policy's delay.
    decide: Decide | None = None

    def next_try(self, attempt: int, error: BaseException) -> float | str:
        """Seconds until the next try, or why there is none."""
        kind = type(error).__name__
        if isinstance(error, self.give_up_on):
            return f"{kind} is not tried again (give_up_on)"
        if self.retry_on is not None and not isinstance(error, self.retry_on):
            return f"{kind} is not tried again (not in retry_on)"
        if not self.policy.may_try_again(attempt):
            return f"attempt {attempt} of {self.policy.max_attempts} failed"
        if self.decide is None:
            return self.policy.delay(attempt, random.random())  # noqa: S311 - jitter
        delay = self.decide(attempt, error)
        return f"the task's retry rule gave up on {kind}" if delay is None else min(MAX_DELAY, max(0.0, float(delay)))
