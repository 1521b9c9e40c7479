"""From an envelope to an outcome: how a run ends, whatever the task's code does."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, Dead, Retry
from leveret.executors.attempt import Runner
from leveret.model import MAX_TRACEBACK, DeadLettered, Envelope, Outcome, Retrying, Succeeded, new_id
from leveret.model.retry import MAX_DELAY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")


@contextmanager
def running(app: App) -> Iterator[Runner]:
    runner = Runner(app, concurrency=2)
    try:
        yield runner
    finally:
        runner.close()


def envelope(task: str | None, *args: Any) -> Envelope:
    return Envelope(new_id(), "default", task, msgspec.json.encode({"args": args}))


async def outcome_of(function: Callable[..., Any], *args: Any) -> Outcome:
    app = App("memory://")
    app.task(name="task")(function)
    with running(app) as runner:
        return await runner.run(envelope("task", *args))


async def retrying(function: Callable[..., Any]) -> Retrying:
    outcome = await outcome_of(function)
    assert isinstance(outcome, Retrying)
    return outcome


def raising(error: BaseException, *, kind: str) -> Callable[[], Any]:
    """A task that raises it: an ``async def`` one at once or after a pause, or a plain one."""

    async def at_once() -> None:
        raise error

    async def later() -> None:
        await asyncio.sleep(0)
        raise error

    def plain() -> None:
        raise error

    return {"async": at_once, "async, later": later, "sync": plain}[kind]


any_kind = pytest.mark.parametrize("kind", ["async", "async, later", "sync"])


@pytest.mark.parametrize("result", [None, False, 0, ValueError("returned, not raised")], ids=repr)
async def test_a_run_that_returns_has_succeeded(result: Any) -> None:
    """Whatever it returns."""

    async def task() -> Any:
        return result

    assert isinstance(await outcome_of(task), Succeeded)
    assert isinstance(await outcome_of(lambda: result), Succeeded)


async def test_the_arguments_arrive() -> None:
    seen: list[Any] = []

    async def coroutine(*args: Any) -> None:
        seen.append(args)

    assert await outcome_of(coroutine, 1, "a") == Succeeded(b"null")
    assert await outcome_of(lambda *args: seen.append(args), [2]) == Succeeded(b"null")
    assert seen == [(1, "a"), ([2],)]


@any_kind
async def test_an_exception_is_tried_again_with_its_traceback(kind: str) -> None:
    outcome = await retrying(raising(ValueError("no such file"), kind=kind))
    assert outcome.error == "ValueError: no such file"
    first, second, *rest = outcome.traceback.splitlines()
    assert first == "Traceback (most recent call last):"
    assert second.startswith(f'  File "{__file__}"')  # the task's own; not a frame of Leveret's
    assert rest[-2:] == ["    raise error", "ValueError: no such file"]


async def test_the_cause_is_in_the_traceback() -> None:
    def task() -> None:
        try:
            dict[str, int]()["the cause"]
        except KeyError as error:
            raise ValueError("the end") from error

    outcome = await retrying(task)
    assert outcome.error == "ValueError: the end"
    assert "KeyError: 'the cause'" in outcome.traceback


@any_kind
async def test_giving_up_is_dead_with_the_reason(kind: str) -> None:
    outcome = await outcome_of(raising(Dead("no such customer"), kind=kind))
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason == "no such customer"
    assert "no such customer" in outcome.traceback


async def test_giving_up_without_a_word_is_dead() -> None:
    outcome = await outcome_of(raising(Dead(), kind="async"))
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason == "the task gave up"


@any_kind
@pytest.mark.parametrize(
    ("make", "summary"),
    [
        (lambda: SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt, "KeyboardInterrupt"),
        (GeneratorExit, "GeneratorExit"),
        (lambda: StopIteration("x"), "StopIteration"),
        (StopAsyncIteration, "StopAsyncIteration"),
        (asyncio.CancelledError, "asyncio.exceptions.CancelledError"),
        (TimeoutError, "TimeoutError"),
        (lambda: BaseExceptionGroup("several", [SystemExit()]), "BaseExceptionGroup: several"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
async def test_no_exception_ends_the_runner(make: Callable[[], BaseException], summary: str, kind: str) -> None:
    """Not even those that end a process; a StopIteration, which no coroutine can raise, is told by its name."""
    outcome = await retrying(raising(make(), kind=kind))
    assert summary in outcome.error
    assert type(make()).__name__ in outcome.traceback


async def test_a_timeout_of_the_tasks_own_is_an_error_like_others() -> None:
    async def task() -> None:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    assert (await retrying(task)).error == "TimeoutError"


async def timed(function: Callable[..., Any]) -> str:
    """The error of a task that may run for a moment."""
    app = App("memory://")
    app.task(name="task", timeout=0.05)(function)
    with running(app) as runner:
        outcome = await runner.run(envelope("task"))
    assert isinstance(outcome, Retrying)
    return outcome.error


async def test_the_limit_is_told_from_a_timeout_of_the_tasks_own() -> None:
    async def too_long() -> None:
        await asyncio.Event().wait()

    async def early() -> None:
        raise TimeoutError("the printer is silent")

    async def at_the_limit() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise TimeoutError("the printer is silent")

    assert "TimedOut: task 'task' ran longer than its timeout of 0.05 s" in await timed(too_long)
    assert await timed(early) == "TimeoutError: the printer is silent"
    assert await timed(at_the_limit) == "TimeoutError: the printer is silent"


async def test_the_last_attempt_that_fails_is_dead() -> None:
    app = App("memory://")
    app.task(name="task", max_attempts=3)(raising(ValueError("no"), kind="sync"))
    last = msgspec.structs.replace(envelope("task"), attempt=3)
    with running(app) as runner:
        assert isinstance(await runner.run(msgspec.structs.replace(last, attempt=2)), Retrying)
        outcome = await runner.run(last)
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason == "ValueError: no; attempt 3 of 3 failed"


@pytest.mark.parametrize("wait", [math.inf, -math.inf, math.nan, 1e300, "soon", -1.0])
async def test_a_retry_rule_that_names_no_time_does_not_lose_the_task(wait: Any) -> None:
    """The moment of the next try must be one that a broker can store."""
    app = App("memory://")
    app.task(name="task", retry=lambda attempt, error: wait)(raising(ValueError("no"), kind="sync"))  # noqa: ARG005
    with running(app) as runner:
        outcome = await runner.run(envelope("task"))
    assert isinstance(outcome, Retrying)
    assert 0 <= outcome.delay <= MAX_DELAY


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class DeadAndUnprintable(Dead):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class RetryWithoutDelay(Retry):
    def __init__(self) -> None:
        """Forgets its base."""


async def test_an_exception_with_a_mistake_of_its_own_is_one_too() -> None:
    assert "Unprintable" in (await retrying(raising(Unprintable(), kind="async"))).error
    assert "RetryWithoutDelay" in (await retrying(raising(RetryWithoutDelay(), kind="async"))).error
    assert isinstance(await outcome_of(raising(DeadAndUnprintable(), kind="async")), DeadLettered)


@pytest.mark.parametrize("error", [OSError("cannot read '\udcff.jpg'"), Dead("cannot read '\udcff.jpg'")], ids=repr)
async def test_what_is_told_of_an_exception_can_be_stored(error: Exception) -> None:
    """A file's name that is no UTF-8 comes as lone surrogates, which no broker and no pipe can carry."""
    outcome = await outcome_of(raising(error, kind="sync"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(outcome), type=Outcome) == outcome


async def test_long_texts_lose_their_middle() -> None:
    outcome = await retrying(raising(ValueError(f"begin {'x' * 100_000} end"), kind="async"))
    assert len(outcome.error) < 1_100
    assert outcome.error.startswith("ValueError: begin")
    assert outcome.error.endswith("end")
    assert len(outcome.traceback) < MAX_TRACEBACK + 100


@pytest.mark.parametrize(
    ("body", "task", "reason"),
    [
        (b'{"args":[1]}', "absent", "UnknownTask: no task is registered as 'absent'"),
        (b'{"args":[1]}', None, "UnknownTask: the message names no task"),
        (b"not JSON", "task", "UnreadableBody: the body is not JSON"),
        (b'{"args":[1,2]}', "task", "InvalidArguments: too many positional arguments"),
        (b'{"args":["1"]}', "task", "InvalidArguments: argument 'number' of task 'task' does not fit int"),
    ],
)
async def test_what_cannot_be_run_is_dead(body: bytes, task: str | None, reason: str) -> None:
    app = App("memory://")
    calls: list[int] = []

    @app.task(name="task")
    def function(number: int) -> None:
        calls.append(number)

    with running(app) as runner:
        outcome = await runner.run(Envelope(new_id(), "default", task, body))
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.startswith(reason)
    assert calls == []


async def test_the_arguments_errors_of_the_task_itself_are_tried_again() -> None:
    """An InvalidArguments or TypeError out of its body is the task's failure, not the message's."""

    def task() -> None:
        int(None)  # type: ignore[call-overload]

    assert (await retrying(task)).error.startswith("TypeError: int() argument")


async def test_a_queues_default_task_takes_what_names_none() -> None:
    app = App("memory://")
    seen: list[bytes] = []

    @app.task(default=True)
    def fallback(body: bytes) -> None:
        seen.append(body)

    with running(app) as runner:
        assert await runner.run(Envelope(new_id(), "default", None, b"\xff")) == Succeeded(b"null")
    assert seen == [b"\xff"]


async def test_async_tasks_run_on_the_loop_and_plain_ones_on_threads() -> None:
    threads: list[threading.Thread] = []

    async def coroutine() -> None:
        asyncio.get_running_loop()
        threads.append(threading.current_thread())

    await outcome_of(coroutine)
    await outcome_of(lambda: threads.append(threading.current_thread()))
    assert threads[0] is threading.current_thread()
    assert threads[1].name.startswith("leveret-task")


async def test_plain_tasks_run_side_by_side() -> None:
    """As many as the concurrency; the loop goes on meanwhile."""
    app = App("memory://")
    barrier = threading.Barrier(2, timeout=10)
    app.task(name="meet")(lambda: barrier.wait() * 0)
    with running(app) as runner:
        outcomes = await asyncio.gather(*(runner.run(envelope("meet")) for _ in range(2)))
    assert outcomes == [Succeeded(b"0"), Succeeded(b"0")]


async def test_a_plain_task_sees_the_context_and_keeps_its_changes() -> None:
    """As asyncio.to_thread: a copy of the context variables."""
    seen: list[str] = []

    def task() -> None:
        seen.append(place.get())
        place.set("changed")

    token = place.set("here")
    await outcome_of(task)
    await outcome_of(task)
    assert seen == ["here", "here"]
    assert place.get() == "here"
    place.reset(token)


async def test_what_a_plain_task_returns_is_awaited_on_the_loop() -> None:
    """A decorated or partially applied ``async def`` is a plain function that returns a coroutine."""
    seen: list[threading.Thread] = []

    async def inner(error: Exception | None) -> None:
        await asyncio.sleep(0)
        seen.append(threading.current_thread())
        if error is not None:
            raise error

    assert await outcome_of(lambda: inner(None)) == Succeeded(b"null")
    assert (await retrying(lambda: inner(ValueError("late")))).error == "ValueError: late"
    assert seen == [threading.current_thread()] * 2


async def test_the_cancellation_of_the_run_goes_through() -> None:
    """It is the worker that stops: no outcome, the task is handed back uncharged."""
    app = App("memory://")
    started = asyncio.Event()
    ends: list[str] = []

    @app.task
    async def wait() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ends.append("cleaned up")

    with running(app) as runner:
        run = asyncio.create_task(runner.run(envelope("wait")))
        await started.wait()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
    assert ends == ["cleaned up"]


async def test_the_cancellation_of_a_run_on_a_thread_goes_through() -> None:
    app = App("memory://")
    started, go_on = threading.Event(), threading.Event()

    @app.task
    def wait() -> None:
        started.set()
        go_on.wait(10)

    with running(app) as runner:
        run = asyncio.create_task(runner.run(envelope("wait")))
        await asyncio.to_thread(started.wait, 10)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        go_on.set()


async def test_a_task_that_answers_its_cancellation_with_an_error_has_that_outcome() -> None:
    app = App("memory://")
    started = asyncio.Event()

    @app.task
    async def stubborn() -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("not now") from None

    with running(app) as runner:
        run = asyncio.create_task(runner.run(envelope("stubborn")))
        await started.wait()
        run.cancel()
        outcome = await run
    assert isinstance(outcome, Retrying)
    assert outcome.error == "ValueError: not now"
