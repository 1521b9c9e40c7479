"""When a failed attempt is tried again: pure, so every rule is shown without waiting."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret import App, ConfigurationError, Dead, Retry
from leveret.brokers.rabbitmq.queues.topology import DELAY_STEPS, delay_step
from leveret.executors.attempt import classify
from leveret.model import DeadLettered, Retrying
from leveret.model.retry import RetryPolicy, RetryRules
from tests.support.outbox import sent_by


@given(attempt=st.integers(1, 10_000), chance=st.floats(0, 1), backoff=st.floats(0, 1e6), most=st.floats(0, 1e9))
def test_the_delay_grows_to_the_cap_and_never_beyond(attempt: int, chance: float, backoff: float, most: float) -> None:
    policy = RetryPolicy(backoff=backoff, max_backoff=most)
    assert 0 <= policy.delay(attempt, chance) <= most
    assert policy.delay(attempt, chance) <= policy.delay(attempt, 1)
    assert policy.delay(attempt, 1) <= policy.delay(attempt + 1, 1)


def test_the_default_tries_five_times_over_minutes() -> None:
    policy = RetryPolicy()
    assert [policy.delay(attempt, 1) for attempt in range(1, 5)] == [15, 30, 60, 120]
    assert [policy.may_try_again(attempt) for attempt in (1, 4, 5)] == [True, True, False]
    assert RetryPolicy(max_attempts=None).may_try_again(1_000_000)


def test_rules_by_type() -> None:
    rules = RetryRules(retry_on=(OSError,), give_up_on=(PermissionError,))
    assert isinstance(rules.next_try(1, TimeoutError()), float)
    assert rules.next_try(1, PermissionError()) == "PermissionError is not tried again (give_up_on)"
    assert rules.next_try(1, ValueError()) == "ValueError is not tried again (not in retry_on)"
    assert rules.next_try(5, TimeoutError()) == "attempt 5 of 5 failed"


def test_a_callable_has_the_last_word() -> None:
    rules = RetryRules(decide=lambda attempt, error: None if str(error) == "stop" else attempt * 2.0)
    assert rules.next_try(3, ValueError("go on")) == 6.0
    assert rules.next_try(3, ValueError("stop")) == "the task's retry rule gave up on ValueError"


def test_a_broken_callable_leaves_it_to_the_policy() -> None:
    def broken(attempt: int, error: BaseException) -> float | None:
        raise KeyError(attempt, error)

    outcome = classify(ValueError("x"), 1, RetryRules(RetryPolicy(backoff=8), decide=broken))
    assert isinstance(outcome, Retrying)
    assert 0 <= outcome.delay <= 8


def test_what_a_task_says_itself() -> None:
    rules = RetryRules()
    assert classify(Retry("later", delay=timedelta(minutes=2)), 1, rules) == Retrying(
        "leveret.Retry: later", traceback="leveret.Retry: later\n", delay=120.0
    )
    last = classify(Retry("later", delay=1), 5, rules)
    assert isinstance(last, DeadLettered)
    assert last.reason == "leveret.Retry: later; attempt 5 of 5 failed"
    dead = classify(Dead("why"), 1, rules)
    assert isinstance(dead, DeadLettered)
    assert dead.reason == "why"
    with pytest.raises(ConfigurationError, match=r"Retry\(delay=-1\): it must be 0 or more seconds"):
        Retry(delay=-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_attempts": 0}, "max_attempts is 0"),
        ({"backoff": -1.0}, "backoff is -1.0; it must be 0 or more seconds"),
        ({"max_backoff": -0.5}, "max_backoff is -0.5; it must be 0 or more seconds"),
    ],
)
def test_a_policy_that_makes_no_sense(settings: dict[str, float], message: str) -> None:
    app = App("memory://")
    with pytest.raises(ConfigurationError, match=message):
        app.task(**settings)(print)  # type: ignore[call-overload]


def options_app() -> App:
    app = App("memory://")

    @app.task
    async def work() -> None: ...

    return app


async def test_options_become_moments() -> None:
    app = options_app()
    (work,) = app.tasks
    envelope = await sent_by(app, work.options(delay=timedelta(seconds=90), expires=3600))
    assert envelope.enqueued_at is not None
    assert envelope.due == envelope.enqueued_at + 90
    assert envelope.expires_at == envelope.enqueued_at + 3600
    noon = datetime.now(timezone(timedelta(hours=5))) + timedelta(hours=1)
    assert (await sent_by(app, work.options(at=noon))).due == noon.timestamp()
    assert (await sent_by(app, work.options(delay=5).options(at=noon))).due == noon.timestamp()
    assert (await sent_by(app, work)).due is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": -1}, "delay is -1; it must be 0 or more"),
        ({"delay": 400 * 86_400}, r"delay is 34560000; .* at most 366 days"),
        ({"delay": float("nan")}, "delay is nan; it must be"),
        ({"expires": timedelta(seconds=-1)}, "it must be 0 or more seconds"),
        ({"at": datetime(2030, 1, 1)}, "has no time zone"),  # noqa: DTZ001 - the mistake under test
        ({"at": datetime(2300, 1, 1, tzinfo=UTC)}, "more than a year away"),
        ({"at": datetime(2030, 1, 1, tzinfo=UTC), "delay": 5}, "two ways to say the same"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], message: str) -> None:
    (work,) = options_app().tasks
    with pytest.raises(ConfigurationError, match=message):
        work.options(**options)  # type: ignore[arg-type]


@given(st.floats(0, 366 * 86_400))
def test_a_ladder_is_climbed_down_in_few_steps_and_never_early(delay: float) -> None:
    """Whatever the delay, up to a year: every step fits what remains, and the last eighth of a second needs none."""
    remaining, steps = delay, 0
    while (milliseconds := delay_step(remaining)) is not None:
        assert milliseconds in DELAY_STEPS
        assert milliseconds <= remaining * 1000
        remaining -= milliseconds / 1000
        steps += 1
    assert 0 <= remaining < 0.1251
    assert steps <= len(DELAY_STEPS) + 1
