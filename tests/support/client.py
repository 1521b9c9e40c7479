"""What a test does to a broker from outside, one connection a call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from leveret.brokers import connect
from leveret.model import Envelope, Queue, QueueStats, new_id
from tests.support import ledger_app
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from leveret import App
    from leveret.brokers import Broker
    from leveret.client.task import Task
    from leveret.model import DeadLetter
    from leveret.model.status import Status

T = TypeVar("T")


class Client:
    """Enqueues an application's tasks, `ledger_app`'s by default, and counts what is left."""

    def __init__(self, url: str, app: App = ledger_app.app) -> None:
        self.url = url
        self._app = app

    def enqueue(self, task: Task[..., Any], *arguments: Any) -> str:
        return self.enqueue_many(task, [arguments])[0]

    def enqueue_many(self, task: Task[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[str]:
        async def run() -> list[str]:
            self._app.client.connect_to(self.url)
            try:
                return [handle.id for handle in await task.enqueue_many(calls)]
            finally:
                await self._app.close()

        return asyncio.run(run())

    def publish(self, body: bytes, *, queue: str, task: str | None = None) -> str:
        """A message that no `Task.enqueue` would send."""
        envelope = Envelope(new_id(), queue, task, body)

        async def declare_and_publish(broker: Broker) -> None:
            await broker.declare([Queue(queue)])
            await broker.publish([envelope])

        self._ask(declare_and_publish)
        return envelope.id

    def publish_many(self, envelopes: Sequence[Envelope]) -> None:
        """To queues that are there."""
        self._ask(lambda broker: broker.publish(envelopes))

    def stats(self, queue: str) -> QueueStats:
        found = [one for one in self._ask(lambda broker: broker.queues.stats([queue])) if one.name == queue]
        return found[0] if found else QueueStats(queue, 0, 0, 0, 0)

    def dead(self, queue: str) -> Sequence[DeadLetter]:
        return self._ask(lambda broker: broker.dead_letters.read(queue, limit=100))

    def wait_until_ended(self, id_: str) -> Status:
        """The task's final status."""

        def ended() -> Status | None:
            found = self._ask(lambda broker: broker.statuses.read([id_]))
            return found[0] if found and found[0].is_final else None

        status = wait_until(ended, f"task {id_} has ended")
        assert status is not None
        return status

    def wait_until_empty(self, queue: str) -> None:
        """Nothing is ready or running any more."""

        def empty() -> bool:
            stats = self.stats(queue)
            return stats.ready == stats.running == 0

        wait_until(empty, f"queue {queue!r} is empty")

    def wait_until_counts(self, queue: str, **expected: int) -> None:
        """A quorum queue counts what came back to it, or was just acknowledged, a moment later."""

        def counted() -> bool:
            stats = self.stats(queue)
            return all(getattr(stats, name) == value for name, value in expected.items())

        wait_until(counted, f"queue {queue!r} counts {expected}")

    def wait_until_dead(self, queue: str, count: int) -> Sequence[DeadLetter]:
        return wait_until(lambda: len(found := self.dead(queue)) >= count and found, f"{count} dead letters") or ()

    def _ask(self, question: Callable[[Broker], Awaitable[T]]) -> T:
        async def run() -> T:
            broker = connect(self.url, timeout=20.0)
            try:
                return await question(broker)
            finally:
                await broker.close()

        return asyncio.run(run())
