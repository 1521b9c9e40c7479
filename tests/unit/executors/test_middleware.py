"""Where middleware runs: around every task on the event loop, or around a plain one in its thread."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, ConfigurationError, CurrentTask, current_task
from leveret.executors.attempt import Runner
from leveret.model import DeadLettered, Envelope, Outcome, Retrying, Succeeded, new_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

steps: list[tuple[str, bool]] = []
local = threading.local()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    steps.clear()


def note(step: str) -> None:
    """With whether this is the loop's thread."""
    steps.append((step, threading.current_thread() is threading.main_thread()))


async def on_the_loop(current: CurrentTask, inner: Callable[[], Awaitable[Any]]) -> Any:
    assert current is current_task()
    note("loop: before")
    try:
        return await inner()
    finally:
        note("loop: after")


def session(current: CurrentTask, inner: Callable[[], Any]) -> Any:
    """As one that closes a thread's database connections."""
    assert current is current_task()
    local.session = current.id
    note("session: opened")
    try:
        return inner()
    finally:
        note("session: closed")
        del local.session


def doubling(_: CurrentTask, inner: Callable[[], Any]) -> Any:
    note("doubling")
    return 2 * inner()


def plain(error: BaseException | None = None) -> int:
    note("task")
    assert local.session == current_task().id
    if error is not None:
        raise error
    return 5


async def coroutine() -> int:
    note("task")
    return 5


@contextmanager
def runner_of(function: Callable[..., Any], *layers: Any, middleware: Any = ()) -> Iterator[Runner]:
    app = App("memory://", middleware=middleware, thread_middleware=layers)
    app.task(name="task")(function)
    runner = Runner(app, concurrency=1)
    yield runner
    runner.close()


async def outcome_of(function: Callable[..., Any], *layers: Any, middleware: Any = ()) -> Outcome:
    with runner_of(function, *layers, middleware=middleware) as runner:
        return await runner.run(Envelope(new_id(), "default", "task", b"{}"))


async def test_thread_middleware_is_around_a_plain_task_in_its_thread() -> None:
    assert await outcome_of(plain, session, doubling, middleware=[on_the_loop]) == Succeeded(b"10")
    assert steps == [
        ("loop: before", True),
        ("session: opened", False),
        ("doubling", False),
        ("task", False),
        ("session: closed", False),
        ("loop: after", True),
    ]


async def test_it_is_not_around_an_async_task() -> None:
    assert await outcome_of(coroutine, session, middleware=[on_the_loop]) == Succeeded(b"5")
    assert steps == [("loop: before", True), ("task", True), ("loop: after", True)]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), StopIteration(), asyncio.CancelledError()])
async def test_it_sees_what_the_task_raises(error: BaseException) -> None:
    outcome = await outcome_of(lambda: plain(error), session)
    assert isinstance(outcome, Retrying)
    assert type(error).__name__ in outcome.error
    assert steps[-1] == ("session: closed", False)


async def test_it_may_raise_itself() -> None:
    def refuse(_: CurrentTask, inner: Callable[[], Any]) -> Any:
        raise ConnectionError(f"no database for {inner}")

    outcome = await outcome_of(plain, refuse)
    assert isinstance(outcome, Retrying)
    assert "no database" in outcome.error
    assert steps == []


async def test_a_wrapped_coroutine_is_made_in_the_thread_and_runs_on_the_loop() -> None:
    def wrapper() -> Any:
        note("wrapper")
        return coroutine()

    def around(_: CurrentTask, inner: Callable[[], Any]) -> Any:
        note("around")
        return inner()

    assert await outcome_of(wrapper, around) == Succeeded(b"5")
    assert steps == [("around", False), ("wrapper", False), ("task", True)]


async def test_a_plain_function_among_the_asynchronous_ones_is_told_of() -> None:
    def careless(_: CurrentTask, inner: Callable[[], Any]) -> Any:
        del inner

    outcome = await outcome_of(coroutine, middleware=[careless])
    assert isinstance(outcome, Retrying)
    assert "returned None, which cannot be awaited" in outcome.error
    assert "App(thread_middleware=[...])" in outcome.error


async def test_a_plain_function_that_gives_an_awaitable_is_middleware() -> None:
    assert await outcome_of(coroutine, middleware=[lambda _, inner: inner()]) == Succeeded(b"5")


def test_an_asynchronous_one_has_no_place_in_a_thread() -> None:
    with pytest.raises(ConfigurationError, match=r"thread_middleware has .*on_the_loop.*Give it to middleware="):
        App("memory://", thread_middleware=[on_the_loop])


@pytest.mark.parametrize("name", ["middleware", "thread_middleware"])
@pytest.mark.parametrize("value", [session, [None], ["session"], "session", None])
def test_it_is_a_list_of_functions(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name} is .*; it must be a list of functions"):
        App("memory://", **{name: value})


async def test_what_cannot_run_meets_no_middleware() -> None:
    with runner_of(plain, session) as runner:
        outcome = await runner.run(Envelope(new_id(), "default", "task", msgspec.json.encode({"args": [1, 2]})))
    assert isinstance(outcome, DeadLettered)
    assert steps == []
