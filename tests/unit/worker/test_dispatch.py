"""What becomes of a task whose process died."""

from __future__ import annotations

from leveret.executors import Died, Overran
from leveret.model import DeadLettered, Retrying, RetryPolicy
from leveret.worker.dispatch import after_death

POLICY = RetryPolicy(max_attempts=2)


def test_after_a_death_the_next_attempt_needs_no_wait() -> None:
    assert after_death(Died(1, "killed"), 1, POLICY, 1.0) == Retrying("killed", delay=0.0)


def test_after_a_timeout_it_waits_as_after_any_failure() -> None:
    assert after_death(Overran(1, "too long"), 1, POLICY, 1.0) == Retrying("too long", delay=POLICY.delay(1, 1.0))


def test_a_death_is_an_attempt() -> None:
    assert after_death(Died(1, "killed"), 2, POLICY, 1.0) == DeadLettered("killed; attempt 2 of 2 failed")
