"""What a worker has from when it is connected to its broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.observe import ChildReplaced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker, Consumer
    from leveret.executors import ExecutorEvent
    from leveret.model import QueueStats
    from leveret.worker.awaiting import Awaiting
    from leveret.worker.background import Background
    from leveret.worker.dispatch import Dispatcher
    from leveret.worker.intake import Intake
    from leveret.worker.job import Jobs
    from leveret.worker.listeners import Listeners
    from leveret.worker.prefetch import AdaptiveCredit
    from leveret.worker.runs import Runs
    from leveret.worker.settler import Settler


class NoSession:
    """Before it is connected: no queues, and nothing comes."""

    is_connected = False
    queues: Sequence[str] = ()
    #: How often the connection was lost.
    losses = 0

    def __init__(self, listeners: Listeners) -> None:
        self._listeners = listeners

    async def stats(self) -> Sequence[QueueStats]:
        return ()

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        for event in events:
            if isinstance(event, ChildReplaced):
                self._listeners.notify(event)


class Session:
    """The broker, its consumer, and what works on the jobs that come."""

    def __init__(
        self,
        broker: Broker,
        consumer: Consumer,
        queues: Sequence[str],
        *,
        jobs: Jobs,
        intake: Intake,
        dispatcher: Dispatcher,
        runs: Runs,
        settler: Settler,
        credit: AdaptiveCredit,
        awaiting: Awaiting,
        background: Background,
    ) -> None:
        self.broker = broker
        self.consumer = consumer
        self.queues = queues
        self.jobs = jobs
        self.intake = intake
        self.dispatcher = dispatcher
        self.settler = settler
        self.credit = credit
        self.awaiting = awaiting
        self.background = background
        self._runs = runs

    @property
    def is_connected(self) -> bool:
        return self.consumer.connected

    @property
    def losses(self) -> int:
        """How often the connection was lost."""
        return self.consumer.losses

    async def stats(self) -> Sequence[QueueStats]:
        """What is in its queues. Raises BrokerError."""
        return await self.broker.queues.stats(self.queues)

    async def ready(self) -> int:
        """How many tasks wait with the broker that may be run. Raises BrokerError."""
        paused = self.consumer.paused
        return await self.broker.queues.ready([name for name in self.queues if name not in paused])

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        """The executor tells something."""
        self._runs.on_events(events)

    def close(self) -> None:
        """Decide, say and record nothing more; what was delivered and is not settled goes back with the consumer."""
        self.credit.stop()
        self.settler.stop()
        self.awaiting.stop()
