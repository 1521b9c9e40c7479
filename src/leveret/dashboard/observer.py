"""What the dashboard knows of the broker and the workers now; it asks and listens for as long as somebody looks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers import QueueNames
from leveret.dashboard.history import STEP, Recent
from leveret.errors import LeveretError
from leveret.model import NO_RESULT, DeadLetter, Status, newer, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable

    from leveret.brokers import Broker
    from leveret.client import App
    from leveret.model import QueueStats, WorkerReport

log = logging.getLogger("leveret.dashboard")

#: When nobody has looked for so long, nothing is asked any more (seconds).
IDLE = 600.0
#: So many tasks are remembered, without their results; and so many whole ones that somebody looked at.
_MOST_TASKS = 1_000
_MOST_WHOLE = 32
_MOST_FAILURES = 20
#: What the broker told of a task that has not ended is asked again after that (seconds): some tasks tell no news.
_STALE = 10.0
#: The same of a queue's dead letters whose number has not changed.
_STALE_LETTERS = 15.0
#: Dead letters of one queue that are looked through.
MOST_LETTERS = 10_000
#: So many of them are remembered whole, and of the others so much of a reason (characters).
_MOST_OPENED = 8
_LISTED_REASON = 1_000
#: A larger body is not shown on a page (bytes).
_LARGEST_BODY = 256 * 1024
#: How long a first page waits for the first answers (seconds), and after an error (seconds).
_FIRST = 5.0
_AGAIN = 2.0


class _Whole(msgspec.Struct, frozen=True):
    status: Status
    asked: float


class _Letters(msgspec.Struct, frozen=True):
    letters: Sequence[DeadLetter]
    asked: float
    #: How many there were when this was asked, as the counts told.
    count: int


class Observer:
    """One loop's view. Its values are replaced, never changed, so a page may read them as it likes."""

    def __init__(self, app: App, queues: Iterable[str] = ()) -> None:
        self._app = app
        self._queues = QueueNames([*queues, *(queue.name for queue in app.queues)])
        self.recent = Recent()
        self.stats: Sequence[QueueStats] = ()
        self.workers: Sequence[WorkerReport] = ()
        #: Why nothing is known now; empty when all is well.
        self.problem = ""
        #: Grows with each change.
        self.version = 0
        self._tasks: OrderedDict[str, Status] = OrderedDict()
        #: Of those the ones that failed last, which many others would push out.
        self._failures: OrderedDict[str, Status] = OrderedDict()
        self._whole: OrderedDict[str, _Whole] = OrderedDict()
        #: Without what may be large, and those that somebody looks at.
        self._letters: dict[str, _Letters] = {}
        self._opened: OrderedDict[tuple[str, str], _Letters] = OrderedDict()
        #: RabbitMQ hands a dead letter to one reader at a time: another one would not find it.
        self._at_the_letters = asyncio.Lock()
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
        for known in (self._tasks, self._failures, self._whole, self._letters, self._opened):
            known.clear()
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

    def latest(self, queue: str | None = None) -> list[Status]:
        """The tasks that changed last, the newest first, without their results."""
        return [status for status in reversed(self._tasks.values()) if queue in (None, status.queue)]

    def failures(self) -> list[Status]:
        """The tasks that failed last, the newest first: dead, or waiting for another attempt."""
        return list(reversed(self._failures.values()))

    async def task(self, id_: str) -> Status | None:
        """One task whole. Raises BrokerError."""
        known = self._whole.get(id_)
        fresh = known is not None and (known.status.is_final or time.monotonic() - known.asked < _STALE)
        if not fresh:
            found = next(iter(await self.broker.statuses.read([id_])), None)
            if found is None:
                self._whole.pop(id_, None)
                return self._tasks.get(id_)
            known = _Whole(found, time.monotonic())
        assert known is not None
        self._remember(known)
        return known.status

    async def letters(self, queue: str) -> Sequence[DeadLetter]:
        """A queue's dead letters, the oldest first. Raises BrokerError."""
        async with self._at_the_letters:
            known = self._letters.get(queue)
            count = next((one.dead for one in self.stats if one.name == queue), 0)
            if known is None or known.count != count or time.monotonic() - known.asked > _STALE_LETTERS:
                known = self._letters[queue] = _Letters(await self._read_letters(queue), time.monotonic(), count)
            return known.letters

    async def current_letters(self, queue: str) -> Sequence[DeadLetter]:
        """The same as they are at this moment, to decide about them. Raises BrokerError."""
        async with self._at_the_letters:
            return await self._read_letters(queue)

    async def retry_dead(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        """See `leveret.brokers.DeadLetters.retry`."""
        async with self._at_the_letters:
            return await self.broker.dead_letters.retry(queue, ids)

    async def drop_dead(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        """See `leveret.brokers.DeadLetters.drop`."""
        async with self._at_the_letters:
            return await self.broker.dead_letters.drop(queue, ids)

    async def letter(self, queue: str, id_: str) -> DeadLetter | None:
        """One whole, but for a body that is too large for a page. Raises BrokerError."""
        async with self._at_the_letters:
            known = self._opened.get((queue, id_))
            if known is None or time.monotonic() - known.asked > _STALE_LETTERS:
                found = await self.broker.dead_letters.read(
                    queue, limit=MOST_LETTERS, select=lambda one: _opened(one) if one.envelope.id == id_ else None
                )
                known = _Letters(found, time.monotonic(), len(found))
                self._opened[queue, id_] = known
                while len(self._opened) > _MOST_OPENED:
                    self._opened.popitem(last=False)
            return next(iter(known.letters), None)

    async def _read_letters(self, queue: str) -> Sequence[DeadLetter]:
        return await self.broker.dead_letters.read(queue, limit=MOST_LETTERS, select=_listed)

    async def refresh(self) -> None:
        """Ask again at once: something was changed from here. Raises BrokerError."""
        self._letters.clear()
        self._opened.clear()
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
                    for status in reversed(await self.broker.statuses.recent(_MOST_TASKS)):
                        self._keep(_light(status))
                    self._changed()
                    async for updates in news:
                        self._fold(updates)
            except Exception as error:  # noqa: BLE001 - as above
                self._fail(error)
            # What was missed meanwhile is asked for.
            self._whole.clear()
            await asyncio.sleep(_AGAIN)

    def _fold(self, updates: Iterable[Status]) -> None:
        for update in updates:
            known = self._tasks.get(update.id)
            status = newer(known, update)
            if status.is_final and status.started_at is not None and (known is None or not known.is_final):
                self.recent.ran(status.at - status.started_at)
            self._keep(_light(status))
            whole = self._whole.get(update.id)
            if whole is not None:
                self._whole[update.id] = _Whole(newer(whole.status, update), whole.asked)
        self._changed()

    def _keep(self, status: Status) -> None:
        _put(self._tasks, status, _MOST_TASKS)
        if status.state in ("dead", "retrying"):
            _put(self._failures, status, _MOST_FAILURES)
        else:
            self._failures.pop(status.id, None)

    def _remember(self, whole: _Whole) -> None:
        self._whole[whole.status.id] = whole
        self._whole.move_to_end(whole.status.id)
        while len(self._whole) > _MOST_WHOLE:
            self._whole.popitem(last=False)

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


def _put(statuses: OrderedDict[str, Status], status: Status, most: int) -> None:
    """As the latest; the oldest go."""
    statuses[status.id] = status
    statuses.move_to_end(status.id)
    while len(statuses) > most:
        statuses.popitem(last=False)


def _light(status: Status) -> Status:
    """Without what may be large."""
    error = None if status.error is None else shorten(status.error, _LISTED_REASON)
    return msgspec.structs.replace(
        status, encoded_result=NO_RESULT, traceback="", body=None, history=[], error=error, problem=""
    )


def _listed(letter: DeadLetter) -> DeadLetter:
    """For a list: thousands of these are held."""
    envelope = msgspec.structs.replace(letter.envelope, body=b"", headers={}, last_error=None)
    return msgspec.structs.replace(
        letter, envelope=envelope, reason=shorten(letter.reason, _LISTED_REASON), traceback=""
    )


def _opened(letter: DeadLetter) -> DeadLetter:
    size = len(letter.envelope.body)
    if size <= _LARGEST_BODY:
        return letter
    told = f"({size} bytes, too large for a page: leveret dead show has it)".encode()
    return msgspec.structs.replace(letter, envelope=msgspec.structs.replace(letter.envelope, body=told))
