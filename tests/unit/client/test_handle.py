"""What a handle remembers of its task, and what it asks again."""

from __future__ import annotations

import pytest

from leveret import TaskFailed
from leveret.brokers.memory import MemoryBroker
from leveret.observe.events import TaskSettled
from tests.support.bench import Bench


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
