"""An exception group is judged by what is in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, Dead, Retry
from leveret.executors.attempt import classify
from leveret.model import DeadLettered, Retrying
from leveret.model.retry import RetryPolicy, RetryRules, leaves
from leveret.testing import TasksFailed, under_test

if TYPE_CHECKING:
    from leveret.model import Outcome


def group(*errors: BaseException) -> BaseException:
    return BaseExceptionGroup("several", errors)


def judged(error: BaseException, *, attempt: int = 1, **rules: Any) -> Outcome:
    return classify(error, attempt, RetryRules(RetryPolicy(backoff=0), **rules))


@pytest.mark.parametrize(
    "error", [group(Dead("no order 0")), group(ValueError(), group(OSError(), Dead("no order 0")))]
)
def test_one_that_gives_up_does_it_for_all(error: BaseException) -> None:
    outcome = judged(error)
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason == "no order 0"
    assert "no order 0" in outcome.traceback


def test_every_reason_is_told() -> None:
    outcome = judged(group(Dead("no order 0"), group(Dead(), Dead("no customer"))))
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason == "no order 0; no customer"


def test_the_longest_wait_counts() -> None:
    outcome = judged(group(Retry(delay=60), group(Retry(delay=3600), Retry())))
    assert isinstance(outcome, Retrying)
    assert outcome.delay == 3600
    assert "ExceptionGroup: several" in outcome.error


def test_a_request_beside_a_failure_waits_for_both() -> None:
    outcome = classify(group(Retry(delay=1), OSError()), 1, RetryRules(decide=lambda *_: 30.0))
    assert isinstance(outcome, Retrying)
    assert outcome.delay == 30
    assert isinstance(judged(group(Retry(delay=1), OSError()), give_up_on=OSError), DeadLettered)


def test_a_group_is_tried_again_if_all_of_it_would_be() -> None:
    network: dict[str, Any] = {"retry_on": (ConnectionError, TimeoutError)}
    assert isinstance(judged(group(ConnectionResetError(), TimeoutError()), **network), Retrying)
    outcome = judged(group(ConnectionResetError(), ValueError("bad")), **network)
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.endswith("; ValueError is not tried again (not in retry_on)")
    outcome = judged(group(OSError(), group(ValueError("bad"))), give_up_on=ValueError)
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.endswith("; ValueError is not tried again (give_up_on)")
    assert isinstance(judged(group(OSError(), KeyError()), give_up_on=ValueError), Retrying)


def test_the_groups_own_class_can_be_named() -> None:
    assert isinstance(judged(group(KeyError()), retry_on=ExceptionGroup), Retrying)
    assert isinstance(judged(group(KeyError()), give_up_on=ExceptionGroup), DeadLettered)
    assert isinstance(judged(group(KeyError()), retry_on=ExceptionGroup, give_up_on=KeyError), DeadLettered)


def test_attempts_are_counted_as_ever() -> None:
    outcome = judged(group(Retry(delay=5)), attempt=5)
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.endswith("; attempt 5 of 5 failed")


def test_a_retry_rule_is_asked_for_each() -> None:
    asked: list[type] = []

    def rule(_: int, error: BaseException) -> float | None:
        asked.append(type(error))
        return None if isinstance(error, ValueError) else 5.0

    outcome = judged(group(OSError(), group(KeyError())), decide=rule)
    assert (asked, isinstance(outcome, Retrying)) == ([OSError, KeyError], True)
    outcome = judged(group(OSError(), ValueError()), decide=rule)
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.endswith("; the task's retry rule gave up on ValueError")


def test_what_is_in_a_group_twice_is_looked_at_once() -> None:
    error = OSError()
    assert leaves(group(error, group(error))) == [error]
    many: BaseException = error
    for _ in range(60):
        many = group(many, many)
    assert leaves(many) == [error]


async def test_a_task_group_in_a_task() -> None:
    app = App("memory://")

    async def part(error: Exception) -> None:
        await asyncio.sleep(0)
        raise error

    @app.task(max_attempts=3, backoff=0)
    async def whole(kind: str) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(part(Dead("gone") if kind == "dead" else Retry(delay=60)))
            tasks.create_task(part(Retry(delay=30)))

    with under_test(app) as test:
        await whole.enqueue("retry")
        (run,) = await test.drain()  # it asked to be tried again, which is no failure
        assert isinstance(run.outcome, Retrying)
        assert run.outcome.delay == 60
        await whole.enqueue("dead")
        with pytest.raises(TasksFailed):
            await test.drain()
        assert await test.drain() == []
        await whole.enqueue("dead")
        (run,) = await test.drain(expect=Dead)
        assert run.outcome == DeadLettered("gone", run.outcome.traceback)  # type: ignore[union-attr]
