"""`leveret.testing.under_test`: waiting for tasks and cancelling them while a worker of the test runs others."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from leveret import App
from leveret.brokers.feeds import Feeds
from leveret.testing import AppUnderTest, under_test
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from typing import TypeAlias

    from leveret.brokers import Feed

    IsFollowed: TypeAlias = Callable[[], Awaitable[bool]]

app = App("memory://")
#: Each for one run of `long`.
begun = threading.Event()
#: For `followed`.
go_on = threading.Event()


@app.task
async def inner() -> int:
    return 7


@app.task
async def followed() -> int:
    """Not done before somebody waits for it."""
    await until(may_go_on, "it is followed")
    return 7


@app.task
def outer() -> int:
    """In a thread, which has a loop of its own."""
    return app.wait(followed.enqueue_sync().result(timeout=60))


@app.task
async def long() -> None:
    begun.set()
    await asyncio.sleep(60)


@pytest.fixture
def test() -> Iterator[AppUnderTest]:
    begun.clear()
    go_on.clear()
    with under_test(app) as test:
        yield test


async def has_begun() -> bool:
    return begun.is_set()


async def may_go_on() -> bool:
    return go_on.is_set()


@pytest.fixture
def is_followed(monkeypatch: pytest.MonkeyPatch) -> IsFollowed:
    """Whether somebody has begun to wait for a task."""
    waits, add = threading.Event(), Feeds.add

    def noted(self: Feeds, feed: Feed) -> None:
        add(self, feed)
        waits.set()

    async def is_set() -> bool:
        return waits.is_set()

    monkeypatch.setattr(Feeds, "add", noted)
    return is_set


async def test_a_task_waits_for_one_that_it_enqueued(test: AppUnderTest, is_followed: IsFollowed) -> None:
    waiting = await outer.enqueue()
    draining = asyncio.ensure_future(test.drain(concurrency=3))
    await until(is_followed, "the thread waits")
    go_on.set()
    async with asyncio.timeout(60):
        await draining
        assert await waiting.result() == 7


def test_a_thread_waits_for_what_a_loop_runs_later(test: AppUnderTest, is_followed: IsFollowed) -> None:
    """It began to wait before there was a worker."""
    handle = inner.enqueue_sync()
    results: list[int] = []
    waiting = threading.Thread(target=lambda: results.append(app.wait(handle.result(timeout=60))))
    waiting.start()

    async def program() -> None:
        await until(is_followed, "the thread waits")
        await test.drain()

    asyncio.run(program())
    waiting.join(10)
    assert results == [7]


@pytest.mark.parametrize("seconds", [0.0, 3_600.0])
async def test_a_running_task_is_cancelled(test: AppUnderTest, seconds: float) -> None:
    """However late it is by the test's clock."""
    handle = await long.enqueue()
    draining = asyncio.ensure_future(test.drain())
    await until(has_begun, "it runs")
    test.clock.advance(seconds)
    async with asyncio.timeout(60):
        assert (await handle.cancel(timeout=60)).state == "cancelled"
        (run,) = await draining
    assert run.kept


async def test_nothing_is_delayed_when_it_was_cancelled(test: AppUnderTest) -> None:
    cancelled, later = await inner.options(delay=60).enqueue(), await inner.options(delay=3_600).enqueue()
    assert (await cancelled.cancel()).state == "cancelled"
    assert test.clock.skip() == pytest.approx(3_600, abs=1)
    assert len(await test.drain()) == 1
    assert (await later.status()).state == "succeeded"
    again = await inner.options(delay=60).enqueue()
    await again.cancel()
    assert test.clock.skip() == 0.0
    test.clock.advance(61)
    assert await test.drain() == []
