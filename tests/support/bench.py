"""An application, a memory broker and a worker, all in this process."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from leveret import App, Dead, Queue
from leveret.brokers.memory import MemoryBroker
from leveret.executors.in_process import InProcessExecutor
from leveret.model import Envelope, QueueStats, new_id
from leveret.observe.events import Event, TaskSettled, WorkerReady
from leveret.worker.worker import Worker
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from leveret.brokers import Broker
    from leveret.observe import Telemetry


E = TypeVar("E")


class Bench:
    """An application with some tasks, what they did, and a queue to put them in."""

    def __init__(self, broker: Broker | None = None, telemetry: Telemetry | None = None) -> None:
        self.app = App("memory://", telemetry=telemetry)
        self.broker: Broker = broker or MemoryBroker()
        self.done: list[str] = []
        self.events: list[Event] = []
        self.gate = asyncio.Event()

        @self.app.task(queue="work")
        async def say(text: str) -> None:
            self.done.append(text)

        @self.app.task(queue="work", acknowledge="before")
        async def say_once(text: str) -> None:
            self.done.append(text)

        @self.app.task(queue="work", acknowledge="before")
        async def wait_once(text: str) -> None:
            self.done.append(f"start {text}")
            await self.gate.wait()

        @self.app.task(queue="work")
        async def count(text: str) -> int:
            return len(text)

        @self.app.task(queue="work")
        async def wait(text: str) -> None:
            self.done.append(f"start {text}")
            await self.gate.wait()
            self.done.append(f"end {text}")

        @self.app.task(queue="work", backoff=0)
        async def fail_once(text: str) -> None:
            self.done.append(text)
            if self.done.count(text) == 1:
                raise ValueError(text)

        @self.app.task(queue="work")
        async def give_up(text: str) -> None:
            raise Dead(text)

    async def put(self, task: str | None, *texts: str, returns: int = 0) -> None:
        """Enqueue; with ``returns``, after the broker had them back so often."""
        await self.broker.declare([Queue("work")])
        await self.broker.publish(
            [Envelope(new_id(), "work", task, msgspec.json.encode({"args": [text]})) for text in texts]
        )
        for _ in range(returns):
            async with self.broker.consume([Queue("work")], credit=None):
                pass

    @asynccontextmanager
    async def working(self, *, concurrency: int = 2, **options: Any) -> AsyncGenerator[Worker]:
        """A worker that takes tasks; stopped at the end."""
        listeners = [*options.pop("listeners", []), self.events.append]
        executor = InProcessExecutor(self.app, concurrency=concurrency)
        worker = Worker(executor, broker=self.broker, listeners=listeners, **{"grace": 5.0, **options})
        run = asyncio.create_task(worker.run())
        await self.wait_for(lambda: run.done() or self.told(WorkerReady), "the worker is ready")
        try:
            yield worker
        finally:
            worker.stop()
            await asyncio.wait_for(run, PATIENCE)

    async def wait_for(self, condition: Callable[[], object], what: str, within: float = PATIENCE) -> None:
        async def holds() -> object:
            return condition()

        await until(holds, f"{what}; {self.done}", within)

    async def wait_until_settled(self, count: int) -> list[TaskSettled]:
        await self.wait_for(lambda: len(self.told(TaskSettled)) >= count, f"{count} tasks are settled")
        return self.told(TaskSettled)

    def told(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def stats(self) -> QueueStats:
        (stats,) = await self.broker.queues.stats()
        return stats

    async def counts(self) -> tuple[int, int, int]:
        stats = await self.stats()
        return stats.ready, stats.running, stats.dead
