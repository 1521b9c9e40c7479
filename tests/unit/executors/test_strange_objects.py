"""Whatever a task's own objects do, its attempt ends in exactly one outcome, and nothing else ends with it."""

from __future__ import annotations

import asyncio
import gc
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, BrokerUnavailable, ConfigurationError, LeveretError
from leveret.brokers.memory import MemoryBroker
from leveret.executors import Finished, RunRequest
from leveret.executors.attempt import JobRunner, Runner
from leveret.model import DeadLettered, Envelope, Outcome, Retrying, Succeeded, new_id
from leveret.model.retry import MAX_DELAY, RetryRules
from leveret.testing import under_test
from tests.support.strange_app import ENDING, FAILING, MISTAKEN, RULES, NoWords, register
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from leveret.brokers import OnConflict
    from leveret.executors import ExecutorEvent

APP = App("memory://")
NAMES = register(APP)


@pytest.fixture(autouse=True)
def _no_word_of_finalizers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some of the objects raise in their ``__del__``, which Python tells here, and not in a later test."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    yield
    gc.collect()


async def outcome_of(app: App, name: str) -> Outcome:
    """Through a crew, as in a child: exactly one report, which a frame can carry."""
    outcomes: list[Outcome] = []

    def take(reports: Sequence[ExecutorEvent]) -> None:
        outcomes.extend(report.outcome for report in reports if isinstance(report, Finished))

    crew = JobRunner(Runner(app, concurrency=1), concurrency=1)
    crew.report_to(take)
    crew.submit([RunRequest(1, Envelope(new_id(), "default", name, b"{}"))])

    async def told() -> bool:
        return bool(outcomes)

    await until(told, f"{name!r} has ended")
    assert not crew.running
    await crew.stop()
    (outcome,) = outcomes
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(outcome), type=Outcome) == outcome
    return outcome


@pytest.mark.parametrize("name", NAMES)
async def test_an_attempt_ends_in_one_outcome(name: str) -> None:
    outcome = await outcome_of(APP, name)
    assert isinstance(outcome, (Retrying, DeadLettered, Succeeded))
    assert isinstance(outcome, Succeeded) == (name in ENDING)
    if isinstance(outcome, Retrying):
        assert 0 <= outcome.delay <= MAX_DELAY


@pytest.mark.parametrize("name", [*FAILING, *ENDING, *MISTAKEN, *(f"a rule says {rule}" for rule in RULES)])
async def test_a_drain_ends(name: str) -> None:
    (function,) = [task for task in APP.tasks if task.name == name]
    with under_test(APP) as test:
        await function.enqueue()
        await test.drain(expect=BaseException)
        assert 1 <= len(test.runs) <= 2
        assert all(isinstance(run.outcome, (Retrying, DeadLettered, Succeeded)) for run in test.runs)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("delay is a timedelta", 3600, 3600),
        ("delay is None", 0, 3600),
        ("delay is text", 0, 3600),
        ("delay is endless", MAX_DELAY, MAX_DELAY),
        ("delay is negative", 0, 0),
        ("a rule says a timedelta", 3600, 3600),
    ],
)
async def test_a_delay_is_what_was_meant_or_the_policys(name: str, least: float, most: float) -> None:
    outcome = await outcome_of(APP, name)
    assert isinstance(outcome, Retrying)
    assert least <= outcome.delay <= most


async def test_what_cannot_be_shown_is_named(caplog: pytest.LogCaptureFixture) -> None:
    outcome = await outcome_of(APP, "no words")
    assert isinstance(outcome, Retrying)
    assert outcome.error == "tests.support.strange_app.NoWords: <exception str() failed>"
    assert "raise make()" in outcome.traceback
    await outcome_of(APP, "delay is text")
    assert "the retry rule of a task failed; its policy decides" in caplog.text
    assert "Later.delay is 'soon'; it must be 0 or more seconds" in caplog.text


class Broken:
    """A telemetry that fails at each step in turn."""

    def __init__(self, step: str) -> None:
        self._step = step

    def processing(self, envelope: Envelope, url: str, /) -> Any:
        del envelope, url
        self._fail("processing")

        @contextmanager
        def span() -> Iterator[Callable[..., None]]:
            self._fail("enter")
            yield lambda *_: self._fail("ended")
            self._fail("exit")

        return span()

    def _fail(self, step: str) -> None:
        if step == self._step:
            raise NoWords


@pytest.mark.parametrize("step", ["processing", "enter", "ended", "exit"])
async def test_a_telemetry_that_fails_is_not_the_tasks_failure(step: str, caplog: pytest.LogCaptureFixture) -> None:
    app = App("memory://", telemetry=Broken(step))  # type: ignore[arg-type]
    app.task(name="work")(lambda: 5)
    assert await outcome_of(app, "work") == Succeeded(b"5")
    assert "the application's telemetry failed; the task goes on" in caplog.text


class Sending:
    """A telemetry that raises around an enqueue, or swallows its error."""

    def __init__(self, step: str) -> None:
        self._step = step

    @contextmanager
    def sending(self, envelopes: Sequence[Envelope], _url: str) -> Iterator[Sequence[Envelope]]:
        if self._step == "before":
            raise LookupError("its own mistake")
        try:
            yield envelopes
        except LeveretError:
            if self._step == "swallows":
                return
            raise
        finally:
            if self._step == "after":
                raise LookupError("its own mistake")


async def test_a_telemetry_that_fails_does_not_hide_that_a_task_is_stored(caplog: pytest.LogCaptureFixture) -> None:
    async with App("memory://", telemetry=Sending("after")) as app:  # type: ignore[arg-type]
        task = app.task(name="work")(lambda: 5)
        handle = await task.enqueue()
        assert [one.id for one in await task.enqueue_many([(), ()])]
        assert (await handle.status()).state == "queued"
        (stats,) = await app.client.broker.queues.stats(["default"])
        assert stats.ready == 3
    assert caplog.text.count("LookupError: its own mistake") == 2


@pytest.mark.parametrize("step", ["after", "swallows"])
async def test_a_telemetry_does_not_hide_why_a_task_is_not_stored(step: str) -> None:
    app = App("memory://", telemetry=Sending(step))  # type: ignore[arg-type]
    task = app.task(name="work", queue="elsewhere")(lambda: 5)
    error = BrokerUnavailable("gone")

    class Gone(MemoryBroker):
        async def publish(self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise") -> None:
            del envelopes, on_conflict
            raise error

    with app.client.enqueuing_to(Gone()), pytest.raises(BrokerUnavailable) as caught:
        await task.enqueue()
    assert caught.value is error


async def test_a_telemetry_that_fails_before_a_task_is_stored_does_not_fail_the_enqueue(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with App("memory://", telemetry=Sending("before")) as app:  # type: ignore[arg-type]
        task = app.task(name="work")(lambda: 5)
        await task.enqueue()
        assert [one.ready for one in await app.client.broker.queues.stats(["default"])] == [1]
    assert caplog.text.count("LookupError: its own mistake") == 1


@pytest.mark.parametrize(
    "error",
    [NoWords(), SystemExit(3), asyncio.CancelledError(), GeneratorExit()],
    ids=lambda error: type(error).__name__,
)
async def test_a_middleware_may_raise_anything(error: BaseException) -> None:
    async def middleware(_: Any, inner: Any) -> Any:
        await inner()
        raise error

    app = App("memory://", middleware=[middleware])
    app.task(name="work")(lambda: 5)
    assert isinstance(await outcome_of(app, "work"), Retrying)


async def test_arguments_whose_type_ends_the_process() -> None:
    class Leaving(msgspec.Struct):
        def __post_init__(self) -> None:
            raise SystemExit(3)

    def work(value: Any = None) -> None: ...

    work.__annotations__["value"] = Leaving
    app = App("memory://")
    app.task(work)
    with pytest.raises(SystemExit):
        app.registry.find("work", "default").signature.decode(b'{"args":[{}]}')
    outcome = await Runner(app, concurrency=1).run(Envelope(new_id(), "default", "work", b'{"args":[{}]}'))
    assert isinstance(outcome, Retrying)


# Validated when the task is registered


@pytest.mark.parametrize("kinds", [(OSError,), [OSError], {OSError}, frozenset({OSError}), [(OSError,)], OSError])
def test_exceptions_are_given_as_one_or_some(kinds: Any) -> None:
    app = App("memory://")
    task = app.task(name="a", retry_on=kinds, give_up_on=kinds)(print)
    assert task.retry.retry_on == task.retry.give_up_on == (OSError,)
    assert RetryRules(retry_on=kinds, give_up_on=kinds).retry_on == (OSError,)


@pytest.mark.parametrize("name", ["retry_on", "give_up_on"])
@pytest.mark.parametrize("value", ["OSError", OSError(), str, 5, [OSError, None], {"OSError": 1}, ["x"], object()])
def test_what_is_no_class_of_exceptions_is_refused_at_once(name: str, value: Any) -> None:
    app = App("memory://")
    with pytest.raises(ConfigurationError, match=f"{name} has .*; it must be a class of exceptions"):
        app.task(**{name: value})(print)
    assert app.tasks == ()


async def wait_a_while(attempt: int, _: BaseException) -> float:
    return attempt * 1.0


@pytest.mark.parametrize("rule", [5, "double", wait_a_while, []])
def test_a_retry_rule_is_a_plain_function(rule: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"retry is .*; it must be a plain function"):
        App("memory://").task(retry=rule)
