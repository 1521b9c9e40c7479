"""A worker stores what falls due, and tells its listeners."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from leveret import App, BrokerUnavailable, current_task, every
from leveret.brokers.memory import MemoryBroker
from leveret.executors.in_process import InProcessExecutor
from leveret.model import Declare
from leveret.observe.events import Event, ScheduleAdvanced
from leveret.worker.worker import Worker
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import datetime

    import pytest


class Shop:
    """An application with a schedule of a second, worked for in this process."""

    def __init__(self) -> None:
        self.app = App("memory://")
        self.broker = MemoryBroker()
        self.events: list[Event] = []
        self.runs: list[tuple[str, datetime | None]] = []

        @self.app.task(queue="work", schedule=every(seconds=1, overlap="allow"))
        async def tick() -> None:
            self.runs.append((current_task().id, current_task().scheduled_for))

    @property
    def advanced(self) -> list[ScheduleAdvanced]:
        return [event for event in self.events if isinstance(event, ScheduleAdvanced)]

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[None]:
        worker = Worker(InProcessExecutor(self.app), broker=self.broker, listeners=[self.events.append])
        running = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            worker.stop()
            await running


async def test_what_falls_due_is_stored_and_told() -> None:
    shop = Shop()
    async with shop.working():
        await until(lambda: len(shop.runs) >= 2, "it ran twice")
    (id_, instant), *_ = shop.runs
    assert instant is not None
    assert id_ == f"tick@{instant:%Y%m%dT%H%M%S}Z"
    first = shop.advanced[0]
    assert (first.schedule, len(first.lateness), first.missed, first.skipped) == ("tick", 1, 0, 0)
    assert first.origin is not None
    assert 0 <= first.lateness[0] < 5


async def test_a_newer_programs_schedule_is_in_force_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Two deployments of one application that differ."""
    shop = Shop()
    (mine,) = shop.app.registry.schedules("x")
    other = every(hours=1)
    origin = f"{__name__}:work"
    schedule = type(mine)(mine.name, other, mine.message, origin)
    await shop.broker.schedules.ask(Declare(origin, 1e12, [schedule]))
    with caplog.at_level(logging.WARNING, "leveret.schedules"):
        async with shop.working():
            await until(lambda: "is another one here" in caplog.text, "it is said")
    assert not shop.runs
    assert [row.schedule.timing for row in await shop.broker.schedules.read()] == [other]


async def test_a_broker_that_is_away_for_schedules_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shop = Shop()
    ask, failures = shop.broker.schedules.ask, [BrokerUnavailable("not now")]

    async def failing(request: object) -> object:
        if failures:
            raise failures.pop()
        return await ask(request)  # type: ignore[arg-type]

    monkeypatch.setattr(shop.broker.schedules, "ask", failing)
    async with shop.working():
        await until(lambda: bool(shop.runs), "it runs all the same")
    assert "not now" in caplog.text
