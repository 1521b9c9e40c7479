"""What a handle remembers of its task, and what it asks again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from leveret import App, ResultTimeout, TaskFailed, TaskNotFound
from leveret.brokers.feeds import Feed
from leveret.brokers.memory import MemoryBroker
from leveret.observe.events import TaskSettled
from tests.support.bench import Bench

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from leveret.model import Status


async def test_a_dead_letter_that_was_put_back_is_alive_to_its_handle() -> None:
    """Its result is the new life's; so is what cancelling it says."""
    bench = Bench(MemoryBroker())
    fails = [True]

    @bench.app.task(queue="work", max_attempts=1)
    async def mend(text: str) -> str:
        if fails:
            raise ValueError(text)
        await bench.gate.wait()
        return "mended"

    with bench.app.client.enqueuing_to(bench.broker):
        first, second = await mend.enqueue("a"), await mend.enqueue("b")
        async with bench.working():
            for handle in (first, second):
                with pytest.raises(TaskFailed, match="ValueError"):
                    await handle.result(60)
            fails.clear()
            assert len(await bench.broker.dead_letters.retry("work", [first.id, second.id])) == 2
            await bench.wait_for(lambda: len(bench.told(TaskSettled)) == 2, "they have been dead once")
            assert (await second.cancel(timeout=60)).state == "cancelled"
            bench.gate.set()
            assert await first.result(60) == "mended"


async def test_what_the_broker_does_not_know_is_told_when_the_time_is_over() -> None:
    async with App("memory://") as app:
        with pytest.raises(TaskNotFound, match="nothing is known of task 'order-17'"):
            await app.handle("order-17").result(0.1)


async def test_a_broker_that_says_nothing_in_time_has_not_said_that_the_task_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @asynccontextmanager
    async def silent(_: Sequence[str]) -> AsyncGenerator[AsyncIterator[Sequence[Status]]]:
        await asyncio.Event().wait()
        yield aiter(Feed([]))

    async with App("memory://") as app:
        monkeypatch.setattr(app.client, "follow", silent)
        with pytest.raises(ResultTimeout, match=r"nothing was heard of task order-17 within 0\.01 s,"):
            await app.handle("order-17").result(0.01)
