"""What a running task knows of itself, and what is wrapped around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, CurrentTask, NoCurrentTask, current_task
from leveret.executors.attempt import Runner
from leveret.model import DeadLettered, Envelope, Outcome, Retrying, Succeeded

if TYPE_CHECKING:
    from leveret.model import Inner


async def run(app: App, name: str, attempt: int = 1) -> Outcome:
    runner = Runner(app, concurrency=2)
    try:
        return await runner.run(Envelope("the-id", "default", name, b"{}", attempt=attempt, headers={"trace": "x"}))
    finally:
        runner.close()


async def test_a_task_knows_itself_in_a_coroutine_and_in_a_thread() -> None:
    app = App("memory://")
    seen: list[CurrentTask] = []

    @app.task(max_attempts=7)
    async def asynchronous() -> None:
        seen.append(current_task())

    @app.task
    def threaded() -> None:
        seen.append(current_task())

    assert await run(app, "asynchronous", attempt=3) == Succeeded(b"null")
    assert await run(app, "threaded") == Succeeded(b"null")
    assert seen[0] == CurrentTask("the-id", "asynchronous", "default", 3, 7, None, None, {"trace": "x"})
    assert (seen[1].task, seen[1].attempt, seen[1].max_attempts) == ("threaded", 1, 5)
    with pytest.raises(NoCurrentTask, match="here is none"):
        current_task()


async def test_middleware_is_an_onion() -> None:
    steps: list[str] = []

    async def outer(task: CurrentTask, inner: Inner) -> Any:
        steps.append(f"outer {task.task}")
        try:
            return await inner()
        finally:
            steps.append("outer end")

    async def inner_most(task: CurrentTask, inner: Inner) -> Any:
        assert current_task() is task
        steps.append("inner")
        result = await inner()
        steps.append(f"inner got {result}")
        return result

    app = App("memory://", middleware=[outer, inner_most])

    @app.task
    def work() -> int:
        steps.append("work")
        return 42

    @app.task
    async def fail() -> None:
        raise ValueError("no")

    assert await run(app, "work") == Succeeded(b"42")
    assert steps == ["outer work", "inner", "work", "inner got 42", "outer end"]
    steps.clear()
    assert isinstance(await run(app, "fail"), Retrying)
    assert steps == ["outer fail", "inner", "outer end"]


async def test_middleware_that_fails_is_the_tasks_failure() -> None:
    async def broken(task: CurrentTask, inner: Inner) -> Any:
        raise RuntimeError(f"no database for {task.id}, {inner!r}"[:30])

    app = App("memory://", middleware=[broken])

    @app.task(max_attempts=1)
    async def work() -> None: ...

    outcome = await run(app, "work")
    assert isinstance(outcome, DeadLettered)
    assert outcome.reason.startswith("RuntimeError: no database for the-id")
