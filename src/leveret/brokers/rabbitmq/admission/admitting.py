"""Who goes next, decided with `Gate`, and carried out: to admit a task is to publish it to its task queue, with its
permit as a row of the table.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.gate import Gate, Permits
from leveret.brokers.rabbitmq.admission.admitted import Admitted, Task
from leveret.brokers.rabbitmq.admission.rates import SLOW, SlowRates
from leveret.brokers.rabbitmq.admission.rows import Stored, limits_of, permit_key, permits_of, queues_of
from leveret.brokers.rabbitmq.admission.windows import LOOK, Windows
from leveret.brokers.rabbitmq.coordination import Ride, TenureLost
from leveret.brokers.rabbitmq.queues import admitted, waiting
from leveret.errors import BrokerError
from leveret.model import queue_limit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from leveret.brokers.rabbitmq.admission.asked import Count, Emptied
    from leveret.brokers.rabbitmq.admission.windows import Window
    from leveret.brokers.rabbitmq.amqp import Incoming
    from leveret.brokers.rabbitmq.coordination import Tenure
    from leveret.errors import EnqueueError

log = logging.getLogger("leveret.rabbitmq.limits")

#: Most tasks of a queue that are admitted and have not ended, whatever its limits say; in one that serves several in
#: turn, each further one would stand behind them all.
_MOST, _MOST_FAIR = 2_000, 200
#: The same of all queues: each is a row.
_MOST_PERMITS = 8_000
#: A queue that refuses is left alone for so long (seconds).
_REFUSED = 1.0
#: Most tasks that stand in their queue while those with a rate are admitted; of a fast one as many as start in half a
#: second.
_MOST_AHEAD = 20
_pack = msgspec.msgpack.Encoder().encode


class Admitting:
    """What waits, what was let go, and who is next, while this program holds the table."""

    def __init__(self, tenure: Tenure, count: Count) -> None:
        self._tenure = tenure
        self.gate: Gate[Task] = Gate(Permits(time.time(), SLOW))
        self.permits = self.gate.permits
        self.windows = Windows(
            tenure, count, self.permits, forget=self.gate.clear, take=self._on_messages, room=self.look_again
        )
        self.admitted = Admitted(tenure.epoch)
        self._rates = SlowRates(tenure, self.permits)
        self._numbers = itertools.count(1)
        #: Queues that serve several in turn.
        self._fair: set[str] = set()
        #: Until when a queue is left alone (Unix time).
        self._off: dict[str, float] = {}
        self._changed = asyncio.Event()
        rows = tenure.rows
        self.gate.define(limits_of(rows))
        self.windows.add(queues_of(rows))
        self._rates.load(rows)
        for permit, stored in permits_of(rows).items():
            self.admitted.note(permit, stored)
            self.permits.restore(permit, stored.permit)

    def look_again(self) -> None:
        """Somebody may go who could not."""
        self._changed.set()

    async def run(self) -> None:
        """Admit tasks until the tenure is over: raises TenureLost."""
        while True:
            now = time.time()
            for window in self.windows:
                if window.is_taken and self._off.get(window.queue, 0.0) <= now:
                    await self.admit(window.queue, now)
            await self._wait()

    async def admit(self, queue: str, now: float) -> None:
        """Those of a queue that may go now. Raises TenureLost."""
        found = self.gate.admit(queue, self.room(queue), now)
        if not found:
            return
        if (window := self.windows.get(queue)) is not None:
            window.admitted += len(found)
        try:
            await self._rates.keep([ref for permit, _ in found for ref in self.permits.held[permit].refs], now)
            await self._tenure.enqueue_all([self._ride(queue, permit, task) for permit, task in found])
        except TenureLost:
            raise
        except BrokerError as error:
            log.warning("tasks of queue %r cannot be admitted now: %s", queue, error)
            for permit, task in found:
                self._put_back(permit, task)

    def room(self, queue: str) -> int:
        """How many more of a queue may be admitted, for all that its limits say."""
        window = self.windows.get(queue)
        fastest = None if window is None else window.fastest(self.permits)
        most = _MOST
        if queue in self._fair:
            most = min(_MOST, max(_MOST_FAIR, _MOST_FAIR // 2 + (window.taken if window else 0)))
        room = min(most - self.permits.admitted[queue_limit(queue), ""], _MOST_PERMITS - len(self.permits.held))
        if window is None or fastest is None:
            return room
        ahead = max(_MOST_AHEAD, int(fastest * LOOK / 2))
        return min(room, ahead - window.ready - (window.admitted if window.ready else 0))

    def clear(self, queue: str) -> int:
        """What waits of a queue, and is here, is gone; how many that were."""
        tasks = self.gate.clear(queue)
        for task in tasks:
            task.settle()
        return len(tasks)

    def free(self, emptied: Emptied) -> None:
        """Tasks of a queue that were admitted are gone. Which, may be found out later."""
        self.end(self.admitted.missing(self.admitted.arrived(emptied.queue), emptied))

    def end(self, permits: Iterable[str]) -> None:
        """Their tasks have ended."""
        keys = []
        for permit in permits:
            if permit in self.permits.held:
                keys.append(permit_key(permit))
                self.gate.end(permit)
                self.admitted.end(permit)
                self._settle_kept(permit)
        self._tenure.drop(keys)
        self.look_again()

    def lose(self, queue: str, permits: Collection[str]) -> None:
        """Their tasks are nowhere. One whose message is still here was not stored, and waits anew."""
        if not permits:
            return
        log.warning("%d permits of queue %r are freed: their tasks are nowhere", len(permits), queue)
        for permit in permits:
            kept = self.admitted.kept(permit)
            self.gate.end(permit)
            self.admitted.forget(permit)
            for task in kept[1:]:
                task.settle()
            for task in kept[:1]:
                self._add(task)
        self._tenure.drop(map(permit_key, permits))
        self.look_again()

    def _on_messages(self, window: Window, messages: list[Incoming]) -> None:
        for message in messages:
            task = Task(window, message, waiting(message))
            if not self.admitted.take_back(task):
                self._add(task)
        self.look_again()

    def _add(self, task: Task) -> None:
        """It waits."""
        found, window = task.found, task.window
        if found.fair is not None:
            self._fair.add(window.queue)
        window.limits.update(name for name, _ in found.refs)
        permit = f"{self._tenure.epoch}.{next(self._numbers)}"
        self.gate.add(permit, window.queue, found.refs, found.fair, found.rank, task)

    async def _wait(self) -> None:
        following = self.gate.next_time()
        seconds = _REFUSED if following is None else min(_REFUSED, max(0.0, following - time.time()))
        if not self._changed.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        self._changed.clear()

    def _ride(self, queue: str, permit: str, task: Task) -> Ride:
        stored = Stored(task.id, task.found.stay, queue, list(self.permits.held[permit].refs))
        self.admitted.note(permit, stored)
        self.admitted.keep(permit, task)
        message = admitted(task.message, queue, task.found, permit)
        return Ride(message, permit_key(permit), _pack(stored), partial(self._on_stored, permit, task))

    def _on_stored(self, permit: str, task: Task, refusal: EnqueueError | None) -> None:
        if refusal is not None:
            log.info("task %s is not admitted now: %s", task.id, refusal)
            self._put_back(permit, task)
            return
        if permit in self.permits.held:
            self.admitted.know(permit)
        self._settle_kept(permit)

    def _settle_kept(self, permit: str) -> None:
        for task in self.admitted.kept(permit):
            task.settle()

    def _put_back(self, permit: str, task: Task) -> None:
        """It waits on, and is tried again."""
        queue = task.window.queue
        self._off[queue] = time.time() + _REFUSED
        held = self.permits.held.get(permit)
        self.gate.end(permit)
        self.admitted.forget(permit)
        self.admitted.kept(permit)
        if held is None or self.windows.get(queue) is not task.window or task.window.is_closed:
            return
        self._add(task)
