"""`App(lifespan=...)` in one process: the in-process executor and the tests' kit; what cannot be a lifespan."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError, CurrentTask, current_task
from leveret.errors import AppNotLoaded
from leveret.executors import InProcessExecutor
from leveret.testing import under_test

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


class Shop:
    """An application with a lifespan."""

    def __init__(self, *, at_start: Callable[[], Any] = str, at_end: Callable[[], Any] = str) -> None:
        self.seen: list[Any] = []

        @asynccontextmanager
        async def lifespan(app: App) -> AsyncGenerator[dict[str, int]]:
            self.seen.append(app)
            at_start()
            async with asyncio.timeout(60):  # it ends in the task that it began in, or it could not
                yield {"number": 5}
            self.seen.append("left")
            end = at_end()
            if asyncio.isfuture(end):
                await end

        self.app = App("memory://", lifespan=lifespan)

        @self.app.task
        async def on_the_loop() -> None:
            self.note()

        @self.app.task
        def in_a_thread() -> None:
            self.note()

        self.tasks = (on_the_loop, in_a_thread)

    def note(self) -> None:
        task: CurrentTask[dict[str, int]] = current_task()
        self.seen.append(task.state["number"])


async def test_each_drain_of_a_test_is_a_process_life() -> None:
    shop = Shop()
    with under_test(shop.app) as test:
        for task in shop.tasks:
            await task.enqueue()
        await test.drain()
    assert shop.seen == [shop.app, 5, 5, "left"]


def test_a_test_without_a_loop() -> None:
    shop = Shop()
    with under_test(shop.app) as test:
        shop.tasks[0].enqueue_sync()
        test.drain_sync()
    assert shop.seen == [shop.app, 5, "left"]


@pytest.mark.parametrize("error", [RuntimeError("no database"), SystemExit("no database")])
async def test_one_that_fails(error: BaseException) -> None:
    def fail() -> None:
        raise error

    shop = Shop(at_start=fail)
    with under_test(shop.app) as test:
        await shop.tasks[0].enqueue()
        with pytest.raises(AppNotLoaded, match=r"lifespan could not be entered: \w+: no database \(.*test_lifespan.py"):
            await test.drain()


async def test_one_that_fails_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """What ran has run."""

    def fail() -> None:
        raise RuntimeError("no goodbye")

    shop = Shop(at_end=fail)
    with under_test(shop.app) as test:
        await shop.tasks[0].enqueue()
        assert len(await test.drain()) == 1
    assert "the application's lifespan failed at its end" in caplog.text
    assert "no goodbye" in caplog.text


async def test_one_that_hangs_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    shop = Shop(at_end=lambda: asyncio.get_running_loop().create_future())
    executor = InProcessExecutor(shop.app, stop_timeout=0.01)
    await executor.start(lambda _: None)
    await executor.stop()
    assert "did not end within 0.01 s" in caplog.text


async def test_a_stop_while_it_is_entered() -> None:
    left: list[bool] = []

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncGenerator[None]:
        try:
            await asyncio.sleep(600)
            yield
        finally:
            left.append(True)

    executor = InProcessExecutor(App("memory://", lifespan=lifespan))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(executor.start(lambda _: None), 0.01)
    await executor.stop()
    assert left == [True]


async def test_one_that_breaks_breaks_the_worker() -> None:
    """There is no other process to run the tasks in."""

    async def fail() -> None:
        raise ConnectionError("gone")

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncGenerator[None]:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            yield

    executor = InProcessExecutor(App("memory://", lifespan=lifespan))
    with contextlib.suppress(AppNotLoaded):  # as soon as it fails
        await executor.start(lambda _: None)
    with pytest.raises(AppNotLoaded, match="ended while its process ran tasks"):
        await executor.broken
    await executor.stop()


async def test_without_one_there_is_no_state() -> None:
    app = App("memory://")
    seen: list[Any] = []

    @app.task
    async def look() -> None:
        seen.append(current_task().state)

    with under_test(app) as test:
        await look.enqueue()
        await test.drain()
    assert seen == [None]


async def _generator(_: App) -> AsyncGenerator[None]:
    yield


async def _coroutine(_: App) -> None: ...


@asynccontextmanager
async def _without_app() -> AsyncGenerator[None]:
    yield


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (_generator, "decorate it with @contextlib.asynccontextmanager"),
        (_coroutine, "decorate it with @contextlib.asynccontextmanager"),
        (_without_app, "it is called with the application"),
        (5, "it must be a function"),
    ],
)
def test_what_cannot_be_one(given: Any, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=remedy):
        App("memory://", lifespan=given)
