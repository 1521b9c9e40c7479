"""What a worker tells of its tasks while they run and when they end, for those who follow them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.errors import BrokerError
from leveret.status import Progress, Status, settled, started

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from leveret.brokers import Broker
    from leveret.model import Envelope, Settlement

log = logging.getLogger("leveret.worker")

#: What happens to a task within this time is told as one (seconds): a short task costs one update, at its end.
GATHER = 0.05


class Recorder:
    """Tells of the tasks whose results are kept: all but the ``silent``. ``name``: a task's, by its envelope."""

    def __init__(
        self, broker: Broker, silent: Iterable[str], tasks: Iterable[str], name: Callable[[Envelope], str | None]
    ) -> None:
        self._broker = broker
        self.silence(silent, tasks)
        self._name = name
        self._running: dict[str, Status] = {}
        self._fresh: dict[str, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._telling: set[asyncio.Task[None]] = set()

    def silence(self, silent: Iterable[str], tasks: Iterable[str]) -> None:
        """Tell of all the tasks but these from now on."""
        self._silent = frozenset(silent)
        #: Whether there is any task to tell of.
        self.records = not self._silent.issuperset(tasks)

    def started(self, envelope: Envelope) -> None:
        name = self._name(envelope)
        if name not in self._silent:
            self._running[envelope.id] = started(envelope, name, time.time())
            self._tell_soon(envelope.id)

    def progressed(self, envelope: Envelope, progress: Progress) -> None:
        status = self._running.get(envelope.id)
        if status is not None:
            self._running[envelope.id] = msgspec.structs.replace(status, at=time.time(), progress=progress)
            self._tell_soon(envelope.id)

    def settled(self, settlements: Sequence[Settlement]) -> Sequence[Status]:
        """The updates to record with these outcomes."""
        if not self.records:
            return ()
        now = time.time()
        updates: list[Status] = []
        for delivery, outcome in settlements:
            envelope = delivery.envelope
            name = self._name(envelope)
            if name not in self._silent:
                running = self._running.pop(envelope.id, None)
                self._fresh.pop(envelope.id, None)
                update = settled(envelope, name, outcome, now)
                if running is not None:
                    update = msgspec.structs.replace(update, started_at=running.started_at, progress=running.progress)
                updates.append(update)
        return updates

    def forget(self, envelopes: Iterable[Envelope]) -> None:
        """Tell no more of tasks whose delivery was lost: whoever has it now tells."""
        for envelope in envelopes:
            self._running.pop(envelope.id, None)
            self._fresh.pop(envelope.id, None)

    def stop(self) -> None:
        """Tell no more; what is on its way is given up."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._telling:
            task.cancel()

    def _tell_soon(self, id_: str) -> None:
        self._fresh[id_] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER, self._begin_telling)

    def _begin_telling(self) -> None:
        self._timer = None
        updates = [self._running[id_] for id_ in self._fresh]
        self._fresh.clear()
        if updates:
            task = asyncio.get_running_loop().create_task(self._tell(updates))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, updates: Sequence[Status]) -> None:
        try:
            await self._broker.tell(updates)
        except BrokerError as error:
            log.warning("the progress of %d tasks could not be told: %s", len(updates), error)
