"""Wrapped functions: what a call returns decides how it is run, not what the wrapper looks like."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError, Dead, current_task
from leveret.executors import Finished, RunRequest
from leveret.executors.attempt import JobRunner, Runner
from leveret.model import Cancelled, DeadLettered, Envelope, Outcome, Retrying, Succeeded, new_id
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence

    from leveret.executors import ExecutorEvent

threads: list[str] = []
place: contextvars.ContextVar[str] = contextvars.ContextVar("place", default="nowhere")


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as most are written."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        place.set("wrapped")
        return function(*args, **kwargs)

    return wrapper


def forgetful(function: Callable[..., Any]) -> Callable[..., Any]:
    """One that forgets an await, and its ``wraps``."""

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Caller:
    """An object whose call is asynchronous."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    async def __call__(self) -> Any:
        return await self._function()


class PlainCaller(Caller):
    """One whose call only returns a coroutine."""

    def __call__(self) -> Any:
        return self._function()


class Promise:
    """Awaitable, and no coroutine."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __await__(self) -> Generator[Any, None, Any]:
        return self._function().__await__()  # type: ignore[no-any-return]


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "nothing": lambda function: function,
    "wraps": plainly,
    "wraps twice": lambda function: plainly(plainly(function)),
    "a lambda": lambda function: lambda: function(),
    "a partial": functools.partial,
    "a partial of wraps": lambda function: functools.partial(plainly(function)),
    "an object": Caller,
    "a partial of an object": lambda function: functools.partial(Caller(function)),
    "a plain object": PlainCaller,
    "wraps around an object": lambda function: plainly(Caller(function)),
    "a forgotten await": forgetful,
    "a promise": lambda function: lambda: Promise(function),
    "a method": lambda function: Caller(function).__call__,
}
wrapped = pytest.mark.parametrize("wrapper", WRAPPERS)


class Crewed:
    """A crew with one task, and what was told of its runs."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.app = App("memory://")
        self.app.task(name="task", **options)(function)
        self.outcomes: list[Outcome] = []
        self.crew = JobRunner(Runner(self.app, concurrency=1), concurrency=1)
        self.crew.report_to(self._take)

    async def outcome(self) -> Outcome:
        self.submit()
        return await self.end()

    def submit(self) -> None:
        self.crew.submit([RunRequest(1, Envelope(new_id(), "default", "task", b"{}"))])

    async def end(self) -> Outcome:
        async def told() -> bool:
            return bool(self.outcomes)

        await until(told, "the task has ended")
        await self.crew.stop()
        (outcome,) = self.outcomes
        return outcome

    def _take(self, reports: Sequence[ExecutorEvent]) -> None:
        self.outcomes += [report.outcome for report in reports if isinstance(report, Finished)]


@wrapped
async def test_it_runs_on_the_loop_and_its_result_counts(wrapper: str) -> None:
    async def task() -> str:
        await asyncio.sleep(0)
        assert threading.current_thread() is threading.main_thread()
        return current_task().task

    assert await Crewed(WRAPPERS[wrapper](task)).outcome() == Succeeded(b'"task"')


@wrapped
async def test_its_timeout_cancels_it(wrapper: str) -> None:
    ended: list[str] = []

    async def task() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    outcome = await Crewed(WRAPPERS[wrapper](task), timeout=0.05).outcome()
    assert isinstance(outcome, Retrying)
    assert "TimedOut: task 'task' ran longer than its timeout of 0.05 s" in outcome.error
    assert ended == ["cleaned up"]


@wrapped
async def test_it_is_cancelled(wrapper: str) -> None:
    begun, ended = asyncio.Event(), []

    async def task() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    crewed = Crewed(WRAPPERS[wrapper](task))
    crewed.submit()
    await asyncio.wait_for(begun.wait(), 10)
    crewed.crew.cancel([1])
    assert await crewed.end() == Cancelled("cancelled while it ran")
    assert ended == ["cleaned up"]


@wrapped
async def test_its_own_errors_are_its_own(wrapper: str) -> None:
    async def task() -> None:
        await asyncio.sleep(0)
        raise TimeoutError("the printer is silent")

    outcome = await Crewed(WRAPPERS[wrapper](task), timeout=60).outcome()
    assert isinstance(outcome, Retrying)
    assert outcome.error == "TimeoutError: the printer is silent"


async def test_what_is_cancelled_in_its_thread_does_not_go_on_after_it() -> None:
    """A thread cannot be interrupted; the coroutine that it returns is not begun."""
    begun, go_on, ran = threading.Event(), threading.Event(), []

    async def rest() -> None:
        ran.append("the rest")

    def task() -> Any:
        begun.set()
        go_on.wait(10)
        return rest()

    crewed = Crewed(task)
    crewed.submit()
    await asyncio.to_thread(begun.wait, 10)
    crewed.crew.cancel([1])
    go_on.set()
    assert await crewed.end() == Cancelled("cancelled while it ran")
    assert ran == []


async def test_the_time_in_its_thread_counts() -> None:
    async def rest() -> None:
        await asyncio.Event().wait()

    def task() -> Any:
        deadline = current_task().deadline
        assert deadline is not None
        while time.time() < deadline:
            time.sleep(0.01)
        return rest()

    outcome = await Crewed(task, timeout=0.1).outcome()
    assert isinstance(outcome, Retrying)
    assert "TimedOut" in outcome.error


async def test_what_the_wrapper_sets_the_coroutine_sees() -> None:
    async def task() -> str:
        return place.get()

    assert await Crewed(plainly(task)).outcome() == Succeeded(b'"wrapped"')
    assert place.get() == "nowhere"


async def test_a_plain_function_that_runs_a_coroutine_itself() -> None:
    """As asgiref's ``async_to_sync``: it looks wrapped, and needs a thread without a loop."""

    async def task() -> int:
        return 5

    @functools.wraps(task)
    def wrapper() -> int:
        return asyncio.run(task())

    assert await Crewed(wrapper).outcome() == Succeeded(b"5")


# Generators


def generator() -> Generator[int, None, None]:
    threads.append("the generator ran")
    yield 1


async def asynchronous_generator() -> AsyncGenerator[int]:
    threads.append("the generator ran")
    yield 1


async def iterating() -> AsyncIterator[int]:
    return asynchronous_generator()


class Yielding:
    def __call__(self) -> Generator[int, None, None]:
        yield 1


@pytest.mark.parametrize(
    "function",
    [
        plainly(generator),
        plainly(asynchronous_generator),
        forgetful(generator),
        plainly(forgetful(generator)),
        iterating,
        lambda: (number for number in range(3)),
    ],
)
async def test_a_wrapped_generator_has_not_run(function: Callable[..., Any]) -> None:
    threads.clear()
    outcome = await Crewed(function, store_result=False).outcome()
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.startswith("task 'task' returned a generator, and none of its code has run")
    assert threads == []


async def test_a_decorator_may_go_through_a_generator() -> None:
    @functools.wraps(generator)
    def wrapper() -> list[int]:
        return list(generator())

    assert await Crewed(wrapper).outcome() == Succeeded(b"[1]")


@pytest.mark.parametrize(
    "function", [generator, asynchronous_generator, functools.partial(generator), Yielding(), Yielding().__call__]
)
def test_a_generator_function_is_refused_at_once(function: Any) -> None:
    with pytest.raises(ConfigurationError, match="task 'task' has a 'yield'"):
        App("memory://").task(name="task")(function)


# Signatures


class Annotated:
    def __call__(self, number: int) -> list[bytes]:
        return [bytes(number)]


@pytest.mark.parametrize("function", [Annotated(), functools.partial(Annotated()), plainly(Annotated().__call__)])
def test_a_wrapped_function_has_the_annotations_of_what_it_wraps(function: Any) -> None:
    task = App("memory://").task(name="task")(function)
    with suppress(Dead), pytest.raises(Exception, match="argument 'number' of task 'task' does not fit int"):
        task.signature.encode(("x",), {})
    assert task.returns.encode([b"\xff"], 100) == b'["/w=="]'
