"""What the dashboard knows of the broker and the workers now; it asks and listens for as long as somebody looks."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.brokers import QueueNames
from leveret.dashboard.dead_letters import DeadLetters
from leveret.dashboard.history import STEP, Recent
from leveret.dashboard.tasks import MOST_TASKS, Tasks
from leveret.dashboard.waiting import WaitingTasks
from leveret.errors import LeveretError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers import Broker
    from leveret.client import App
    from leveret.model import QueueStats, Status, WorkerReport

log = logging.getLogger("leveret.dashboard")

#: When nobody has looked for so long, nothing is asked any more (seconds).
IDLE = 600.0
#: How long a first page waits for the first answers (seconds), and after an error (seconds).
_FIRST = 5.0
_AGAIN = 2.0


class Observer:
    """One loop's view. Its values are replaced, never changed, so a page may read them as it likes."""

    def __init__(self, app: App, queues: Iterable[str] = ()) -> None:
        self._app = app
        self._queues = QueueNames([*queues, *(queue.name for queue in app.queues)])
        self.tasks = Tasks(app)
        self.dead_letters = DeadLetters(app)
        self.waiting = WaitingTasks(app)
        self.recent = Recent()
        self.stats: Sequence[QueueStats] = ()
        self.workers: Sequence[WorkerReport] = ()
        #: Why nothing is known now; empty when all is well.
        self.problem = ""
        #: Grows with each change.
        self.version = 0
        self._news = asyncio.Event()
        self._answered = asyncio.Event()
        self._looked = 0.0
        self._running: asyncio.Task[None] | None = None
        self.closed = False

    @property
    def broker(self) -> Broker:
        return self._app.client.broker

    @property
    def asking(self) -> bool:
        """Whether what is known here is kept up to date."""
        return self._running is not None and not self._running.done()

    def look(self) -> None:
        """Somebody looks now: ask and listen from here on."""
        self._looked = time.monotonic()
        if not self.closed and not self.asking:
            self._forget()
            self._running = asyncio.get_running_loop().create_task(self._run())

    def _forget(self) -> None:
        """What was known when somebody looked last, long ago, is not what is now; the charts begin anew."""
        self.recent = Recent()
        self.stats, self.workers, self.problem = (), (), ""
        self.tasks.forget()
        self.dead_letters.forget()
        self.waiting.forget()
        self._answered.clear()

    async def first_answer(self) -> None:
        """Until something is known, or it has taken too long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FIRST):
                await self._answered.wait()

    async def beyond(self, version: int, seconds: float) -> int:
        """The version when it is another one, or after so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.version == version and not self.closed:
                    await self._news.wait()
        return self.version

    def close(self) -> None:
        """Whoever waits for news goes on, and nothing is asked any more."""
        self.closed = True
        self._changed()
        if self._running is not None:
            self._running.cancel()

    async def refresh(self) -> None:
        """Ask again at once: something was changed from here. Raises BrokerError."""
        self.dead_letters.forget()
        self.waiting.forget()
        self.stats = await self._queues.stats(self.broker)
        self._changed()

    async def _run(self) -> None:
        listening = asyncio.get_running_loop().create_task(self._listen())
        try:
            while time.monotonic() - self._looked < IDLE:
                began = time.monotonic()
                try:
                    await self._ask()
                    self._say("")
                except Exception as error:  # noqa: BLE001 - whatever it is, the next answer may come
                    self._fail(error)
                self._answered.set()
                await asyncio.sleep(max(0.1, STEP - (time.monotonic() - began)))
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _ask(self) -> None:
        stats, workers = await asyncio.gather(self._queues.stats(self.broker), self.broker.control.workers())
        for worker in workers:
            self._queues.hear(worker.queues)
        self.stats, self.workers = stats, workers
        self.recent.add(time.time(), stats, workers)
        self._changed()

    async def _listen(self) -> None:
        while True:
            try:
                async with self.broker.statuses.watch() as news:
                    for status in reversed(await self.broker.statuses.recent(MOST_TASKS)):
                        self.tasks.keep(status)
                    self._changed()
                    async for updates in news:
                        self._fold(updates)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)
            # What was missed meanwhile is asked for.
            self.tasks.forget_whole()
            await asyncio.sleep(_AGAIN)

    def _fold(self, updates: Iterable[Status]) -> None:
        for update in updates:
            ran = self.tasks.fold(update)
            if ran is not None:
                self.recent.ran(ran)
        self._changed()

    def _fail(self, error: Exception) -> None:
        problem = str(error) if isinstance(error, LeveretError) else f"{type(error).__name__}: {error}"
        if problem != self.problem and not isinstance(error, LeveretError):
            log.error("the broker cannot be asked", exc_info=error)  # once, not at each new try
        self._say(problem)

    def _say(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._news.set()
        self._news.clear()
