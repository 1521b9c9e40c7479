"""Options as users give them: durations, counts and moments; all else is an error that says what to give."""

from __future__ import annotations

import asyncio
import decimal
import fractions
import math
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from leveret import (
    App,
    ConfigurationError,
    Handle,
    InvalidArguments,
    Queue,
    Retry,
    as_finished,
    gather_results,
)
from leveret.brokers import connect
from leveret.executors.in_process import InProcessExecutor
from leveret.model.arguments import moment
from leveret.model.durations import parse_seconds, spell_seconds
from leveret.model.retry import RetryPolicy, RetryRules
from leveret.testing import under_test
from leveret.worker.program import run_worker
from leveret.worker.worker import Worker
from tests.support.outbox import sent_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret.client.task import Task

app = App("memory://")


@app.task
def work(number: int = 0) -> None: ...


def _nothing() -> None: ...


def task_with(name: str) -> Callable[[Any], Task[..., Any]]:
    def make(value: Any) -> Task[..., Any]:
        options: dict[str, Any] = {name: value}
        made: Task[..., Any] = App("memory://").task(name="work", **options)(_nothing)
        return made

    return make


def handle() -> Handle[Any]:
    return app.handle("id")


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


async def first(items: Any) -> Any:
    return await anext(items)


async def worker_with(grace: Any) -> Worker:
    return Worker(InProcessExecutor(app), grace=grace)


def drained(seconds: Any) -> None:
    with under_test(app) as test:
        test.clock.advance(seconds)
        test.expecting(delay=seconds)


#: Where a duration is asked for: what the error calls it, and how it is given.
DURATIONS: dict[str, Callable[[Any], Any]] = {
    "timeout of a task": task_with("timeout"),
    "backoff": task_with("backoff"),
    "max_backoff": task_with("max_backoff"),
    "backoff of a policy": lambda value: RetryPolicy(backoff=value),
    "delay": lambda value: work.options(delay=value),
    "expires": lambda value: work.options(expires=value),
    "Retry(delay=": lambda value: Retry(delay=value),
    "enqueue_timeout": lambda value: App("memory://", enqueue_timeout=value),
    "keep_results": lambda value: App("memory://", keep_results=value),
    "timeout of a result": lambda value: run(handle().result(value)),
    "timeout of a cancel": lambda value: run(handle().cancel(timeout=value)),
    "timeout of some": lambda value: run(first(as_finished([], timeout=value))),
    "timeout of all": lambda value: run(gather_results([], timeout=value)),
    "timeout of connect": lambda value: connect("memory://", timeout=value),
    "keep": lambda value: connect("memory://", keep=value),
    "grace": lambda value: run(worker_with(value)),
    "grace of a program": lambda value: run_worker("none.py:app", grace=value),
    "what the clock is to advance": drained,
}
GIVEN = [name for name in DURATIONS if name.split(" of ")[-1] not in ("a result", "a cancel", "some", "a program")]
durations = pytest.mark.parametrize("name", DURATIONS)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize(
    "value",
    [5, 5.0, timedelta(seconds=5), decimal.Decimal(5), fractions.Fraction(5), np.float64(5), np.int64(5)],
    ids=lambda value: type(value).__name__,
)
def test_a_duration_is_a_number_or_a_timedelta(name: str, value: Any) -> None:
    DURATIONS[name](value)


@durations
@pytest.mark.parametrize(
    "value",
    [
        *("5", "5m", "", b"5", [5], {}, object(), True, math.nan, math.inf, -math.inf, -1, -0.5, 1j),
        *(timedelta(seconds=-1), datetime.now(UTC), date(2030, 1, 1), time(5), decimal.Decimal("NaN")),
        *(decimal.Decimal("sNaN"), np.float64("nan"), np.timedelta64(5, "m"), 10**400),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:12]}" if not isinstance(value, datetime) else "datetime",
)
def test_all_else_is_refused_with_the_remedy(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DURATIONS[name](value)
    text = str(caught.value)
    assert name.split(" of ")[0] in text
    assert "seconds (a number, or a timedelta)" in text
    assert len(text) < 400


@pytest.mark.parametrize("name", ["timeout of a task", "enqueue_timeout", "keep_results"])
def test_no_time_at_all_is_too_little(name: str) -> None:
    for nothing in (0, timedelta()):
        with pytest.raises(ConfigurationError, match="more than 0 seconds"):
            DURATIONS[name](nothing)


def test_what_is_given_is_what_is_meant() -> None:
    task = App("memory://").task(
        name="work", timeout=timedelta(minutes=1), backoff=timedelta(seconds=2), max_backoff=timedelta(hours=1)
    )(lambda: None)
    assert (task.timeout, task.retry.policy) == (60.0, RetryPolicy(5, 2.0, 3600.0))
    application = App("memory://", keep_results=timedelta(days=1), enqueue_timeout=timedelta(minutes=1))
    assert (application.keep_results, application.enqueue_timeout) == (86_400.0, 60.0)
    assert Retry(delay=timedelta(hours=2)).delay == 7200.0
    assert RetryRules(decide=lambda *_: timedelta(minutes=5)).next_try(1, ValueError()) == 300.0


def test_limits_are_readable() -> None:
    with pytest.raises(ConfigurationError, match=r"delay is 34560000; it must be .*, at most 366 days$"):
        work.options(delay=400 * 86_400)
    with pytest.raises(ConfigurationError, match="at most 366 days"):
        Retry(delay=timedelta(days=400))
    with pytest.raises(ConfigurationError, match="or None for no limit"):
        App("memory://").task(timeout="5")  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match=r"5 minutes are timedelta\(minutes=5\), or 300"):
        work.options(delay="5m")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"pass how far away it is, as moment - datetime.now\(UTC\)"):
        work.options(expires=datetime.now(UTC))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"),
        (1, "1 second"),
        (0.05, "0.05 seconds"),
        (90, "90 seconds"),
        (120, "2 minutes"),
        (3600, "1 hour"),
        (7200, "2 hours"),
        (86_400, "1 day"),
        (366 * 86_400, "366 days"),
    ],
)
def test_a_duration_for_people(seconds: float, text: str) -> None:
    assert spell_seconds(seconds) == text
    assert parse_seconds(seconds) == seconds


# Counts


COUNTS: dict[str, Callable[[Any], Any]] = {
    "max_attempts": task_with("max_attempts"),
    "max_length": lambda value: Queue("small", max_length=value),
    "max_message_size": lambda value: App("memory://", max_message_size=value),
    "max_result_size": lambda value: App("memory://", max_result_size=value),
    "concurrency": lambda value: run_worker("none.py:app", concurrency=value),
    "processes": lambda value: run_worker("none.py:app", processes=value),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [2.5, 3.0, "5", True, -1, 2**70, [5], math.nan, timedelta(5)], ids=repr)
def test_a_count_is_a_whole_number(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        COUNTS[name](value)


def test_a_count_of_numpy_is_one() -> None:
    attempts = task_with("max_attempts")(np.int64(3)).retry.policy.max_attempts
    assert (attempts, type(attempts)) == (3, int)
    assert Queue("small", max_length=np.int32(3)).max_length == 3  # type: ignore[arg-type]


# Moments


async def test_a_moment_has_a_zone() -> None:
    noon = datetime.now(UTC) + timedelta(hours=1)
    assert (await sent_by(app, work.options(at=noon))).due == noon.timestamp()


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (date(2030, 1, 1), r"at is datetime.date\(2030, 1, 1\); a date has no hour: use datetime.combine"),
        (datetime(2030, 1, 1), "has no time zone"),  # noqa: DTZ001 - the mistake under test
        (1_900_000_000, "at is 1900000000; it must be a datetime with a time zone"),
        ("tomorrow", "at is 'tomorrow'; it must be a datetime"),
        (timedelta(5), "for a duration there is delay="),
        (datetime(2300, 1, 1, tzinfo=UTC), "more than a year away; it may be 366 days at most"),
    ],
    ids=str,
)
async def test_all_else_is_no_moment(value: Any, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        await sent_by(app, work.options(at=value))


# The others


@pytest.mark.parametrize("value", ["no", None, 1])
def test_whether_results_are_stored_is_yes_or_no(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"store_result is {value!r}; it must be True or False"):
        App("memory://").task(store_result=value)


@pytest.mark.parametrize("url", [5, b"memory://", Path("leveret.db")])
def test_a_url_is_text(url: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"url is .*; it must be text"):
        App(url)


# Calls of many


async def test_calls_of_many() -> None:
    @app.task
    def add(number: int, *, text: str = "") -> None: ...

    with under_test(app) as test:
        await add.enqueue_many([add.call(1, text="a"), add.call(number=2), (3,)])
        arguments = [one.arguments for one in test.enqueued(add)]
    assert arguments == [{"number": number, "text": "a" if number == 1 else ""} for number in (1, 2, 3)]
    assert repr(add.call(1, text="a")) == "<Call add(1, text='a')>"


@pytest.mark.parametrize("call", ["ab", 5, {"number": 1}, None, b"x"])
async def test_what_is_no_call_is_refused(call: Any) -> None:
    with pytest.raises(InvalidArguments, match="is no call of task 'work': give enqueue_many a tuple"):
        await work.enqueue_many([call])


async def test_a_call_of_another_task_is_refused() -> None:
    other: Any = App("memory://").task(name="other")(lambda: None)
    with pytest.raises(InvalidArguments, match=r"a call of task 'other' was given to 'work'\.enqueue_many"):
        await work.enqueue_many([other.call()])


@pytest.mark.parametrize("year", [1, 1960, 1970])
async def test_a_moment_long_past_is_one_that_every_broker_reads(year: int) -> None:
    """One before 1970 was stored as a negative time, and its task was dead instead of being run at once."""
    with under_test(app) as tested:
        handle = await work.options(at=datetime(year, 1, 1, tzinfo=UTC)).enqueue(3)
        await tested.drain()
        assert (await handle.status()).state == "succeeded"
    assert moment("at", datetime(year, 1, 1, tzinfo=UTC)) == 0.0
