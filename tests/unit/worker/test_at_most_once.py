"""A worker and tasks that are acknowledged before they run, with a broker and an executor in this process."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from leveret import BrokerUnavailable
from leveret.brokers.memory import MemoryBroker
from leveret.brokers.sqlite import SQLiteBroker
from leveret.model import Cancelled, DeadLettered, Envelope, new_id
from leveret.observe.events import TaskSettled, TaskStarted
from leveret.worker import settler as recorder
from leveret.worker.prefetch import TICK
from tests.support.bench import Bench
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from leveret.model import Settlement
    from leveret.model.status import Status


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SETTLE_AGAIN", 0.2)


class Away(MemoryBroker):
    """Takes no outcome as long as it is away."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = True
        self.refused = 0

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        if self.is_away:
            self.refused += 1
            raise BrokerUnavailable("away")
        await super().settle(settlements, updates)


async def test_one_that_is_given_up_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """It is nobody's any more: whoever waits for it is told, and so is the log."""
    caplog.set_level(logging.INFO)
    bench = Bench()
    envelope = Envelope(new_id(), "work", "wait_once", b'{"args":["a"]}')
    await bench.put("say", "first")
    await bench.broker.publish([envelope])
    async with bench.working(grace=0.05):
        await bench.wait_for(lambda: "start a" in bench.done, "it runs")
    (status,) = await bench.broker.statuses.read([envelope.id])
    assert (status.state, status.error) == ("dead", "its worker stopped before it had ended")
    assert (
        "failed, and does not run again (acknowledge='before'): its worker stopped before it had ended" in caplog.text
    )
    assert [event.outcome for event in bench.told(TaskSettled) if event.at_most_once] == [
        DeadLettered("its worker stopped before it had ended")
    ]
    assert await bench.counts() == (0, 0, 0)


async def test_one_that_cannot_be_acknowledged_does_not_start_after_the_stop() -> None:
    """The broker comes back when the worker has given up: it does not run, and is not said to."""
    broker = Away()
    bench = Bench(broker)
    envelope = Envelope(new_id(), "work", "say_once", b'{"args":["a"]}')
    await bench.put("say_once")
    await broker.publish([envelope])
    async with bench.working(grace=0.05) as worker:
        await bench.wait_for(lambda: broker.refused, "it cannot be acknowledged")
        worker.stop()
        await bench.wait_for(lambda: not worker.condition().running, "it is given up")
        broker.is_away = False
    assert bench.done == []
    (status,) = await broker.statuses.read([envelope.id])
    assert status.state == "dead"
    assert await bench.counts() == (0, 0, 0)


async def test_one_that_cannot_be_acknowledged_at_all_goes_back() -> None:
    broker = Away()
    bench = Bench(broker)
    await bench.put("say_once", "a")
    async with bench.working(grace=0.05):
        await bench.wait_for(lambda: broker.refused, "it cannot be acknowledged")
    assert bench.done == []
    assert await bench.counts() == (1, 0, 0)


async def test_one_that_is_cancelled_while_it_is_acknowledged_does_not_begin() -> None:
    """It holds a slot by then, and the executor has not got it."""
    broker = Away()
    bench = Bench(broker)
    envelope = Envelope(new_id(), "work", "say_once", b'{"args":["a"]}')
    await bench.put("say_once")
    await broker.publish([envelope])
    async with bench.working() as worker:
        await bench.wait_for(lambda: broker.refused, "it cannot be acknowledged")
        await broker.control.cancel(envelope.id)
        broker.is_away = False
        (settled,) = await bench.wait_until_settled(1)
        assert (settled.outcome, settled.at_most_once) == (Cancelled("cancelled before it ran"), True)
        assert worker.condition().running == 0
    assert (bench.done, bench.told(TaskStarted)) == ([], [])
    (status,) = await broker.statuses.read([envelope.id])
    assert (status.state, status.error) == ("cancelled", "cancelled before it ran")
    assert await bench.counts() == (0, 0, 0)


async def test_credit_that_short_tasks_brought_is_given_back() -> None:
    """As it is for tasks that are acknowledged when they have run."""
    bench = Bench()
    async with bench.working(concurrency=1, prefetch="auto") as worker:
        await bench.put("say", *map(str, range(2_000)))
        await bench.wait_for(lambda: len(bench.done) == 2_000, "the credit has grown")
        await bench.wait_for(lambda: not worker.condition().running, "nothing runs")
        await asyncio.sleep(2 * TICK)  # and nothing is left to decide
        await bench.put("wait_once", *map(str, range(50)))

        async def are_back() -> bool:
            return (await bench.stats()).ready == 48

        await until(are_back, "of what waits behind the one that runs, all but one go back")
        bench.gate.set()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_it_is_known_at_each_moment(kind: str, tmp_path: Path) -> None:
    """Also when the broker has forgotten it, and it has not begun."""
    broker = MemoryBroker() if kind == "memory" else SQLiteBroker(tmp_path / "tasks.db", timeout=20)
    bench = Bench(broker)
    envelope = Envelope(new_id(), "work", "say_once", b'{"args":["a"]}', enqueued_at=1.0)
    await bench.put("say_once")
    await broker.publish([envelope])
    seen: list[list[str]] = []
    settle = broker.settle

    async def settle_and_look(settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        await settle(settlements, updates)
        seen.append([status.state for status in await broker.statuses.read([envelope.id])])

    broker.settle = settle_and_look  # type: ignore[method-assign]
    async with bench.working():

        async def has_ended() -> bool:
            return [status.state for status in await broker.statuses.read([envelope.id])] == ["succeeded"]

        await until(has_ended, "it has ended")
    assert seen == [["queued"], ["succeeded"]]
    await broker.close()
