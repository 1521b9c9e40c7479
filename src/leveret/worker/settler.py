"""What a worker has the broker record: how its tasks ended, and what those who follow them are told."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.errors import BrokerError, LeaseLost
from leveret.model import Progress, Released, Status, settled, started
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers import Broker
    from leveret.executors import Manifest
    from leveret.model import Delivery, Envelope, Settlement

log = logging.getLogger("leveret.worker")

#: What happens to a task within this time is told as one (seconds): a short task costs one update, at its end.
GATHER = 0.05
#: Longest wait before an outcome that could not be recorded is tried again (seconds).
_SETTLE_AGAIN = 5.0


class Settler:
    """Tells of the tasks whose results are stored."""

    def __init__(self, broker: Broker, manifest: Manifest) -> None:
        self._broker = broker
        self._manifest = manifest
        self._running: dict[str, Status] = {}
        #: Of what has run and is to be recorded (seconds).
        self._run_times: dict[Delivery, float] = {}
        self._fresh: dict[str, None] = {}
        self._warnings = LimitedLog(log)
        self._timer: asyncio.TimerHandle | None = None
        self._telling: set[asyncio.Task[None]] = set()

    def adopt(self, manifest: Manifest) -> None:
        """Go by this application from now on."""
        self._manifest = manifest

    def started(self, envelope: Envelope) -> None:
        if self._stores(envelope):
            self._running[envelope.id] = started(envelope, self._manifest.task_of(envelope), time.time())
            self._tell_soon(envelope.id)

    def progressed(self, envelope: Envelope, progress: Progress) -> None:
        status = self._running.get(envelope.id)
        if status is not None:
            self._running[envelope.id] = msgspec.structs.replace(status, at=time.time(), progress=progress)
            self._tell_soon(envelope.id)

    def ran(self, delivery: Delivery, seconds: float | None) -> None:
        """It has run for so long, and its outcome is not recorded yet."""
        if seconds is not None:
            self._run_times[delivery] = seconds

    def run_time(self, delivery: Delivery) -> float | None:
        """How long it has run, asked once."""
        return self._run_times.pop(delivery, None)

    def acknowledged(self, envelope: Envelope) -> Sequence[Status]:
        """The update to record with a task that the broker shall forget, and that runs then."""
        if not self._stores(envelope):
            return ()
        return [settled(envelope, self._manifest.task_of(envelope), Released(), time.time())]

    def settled(self, settlements: Sequence[Settlement]) -> Sequence[Status]:
        """The updates to record with these outcomes."""
        now = time.time()
        updates: list[Status] = []
        for delivery, outcome in settlements:
            envelope = delivery.envelope
            running = self._running.pop(envelope.id, None)
            self._fresh.pop(envelope.id, None)
            if running is None and not self._stores(envelope):
                continue
            update = settled(envelope, self._manifest.task_of(envelope), outcome, now)
            if running is not None:
                # It was told of, so its end is too, though it may have become silent meanwhile.
                update = msgspec.structs.replace(update, started_at=running.started_at, progress=running.progress)
            updates.append(update)
        return updates

    async def record(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> frozenset[str]:
        """Settle, again and again while the broker can't; the ids whose lease was lost."""
        while True:
            try:
                await self._broker.settle(settlements, updates)
            except LeaseLost as error:
                return frozenset(error.ids)
            except Exception as error:
                if not isinstance(error, BrokerError):
                    log.exception("a mistake in Leveret or its drivers: %d outcomes are not recorded", len(settlements))
                pause = random.uniform(_SETTLE_AGAIN / 10, _SETTLE_AGAIN)  # noqa: S311 - jitter
                self._warnings.warning(
                    "%d outcomes can't be recorded, trying again in %.1f s: %s", len(settlements), pause, error
                )
                await asyncio.sleep(pause)
            else:
                return frozenset()

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
        self._warnings.flush()

    def _stores(self, envelope: Envelope) -> bool:
        return self._manifest.options_of(envelope).store_result

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
            self._warnings.warning("the progress of %d tasks could not be told: %s", len(updates), error)
