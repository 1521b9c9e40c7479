"""What a fault is played on: busy producers and workers on one broker, their ledger, and the verdict at the end."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from chaos.app import ENQUEUE_TIMEOUT, QUEUE, app
from chaos.book import Book
from chaos.producer import RESULTS
from chaos.traffic import QUEUE as TRAFFIC
from leveret.brokers import connect
from leveret.errors import BrokerError
from tests.support.nodes import Node
from tests.support.workers import READY, Ledger, Program, Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from leveret.brokers import Broker
    from leveret.client.task import Task
    from leveret.model import DeadLetter, QueueStats

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
APP = f"{Path(__file__).with_name('app.py')}:app"
#: How many tasks enqueued after the fault must be done before the producers are told to stop.
_FRESH = 10
_LOOK = 0.05
#: Nothing that is waited for takes longer, whatever else goes on (seconds).
_LIMIT = 240.0


class NotPossible(Exception):
    """This machine cannot play the fault; says why."""


class Hung(Exception):
    """Something did not go on within the patience."""


class Profile(msgspec.Struct, frozen=True):
    """How long and how often; seconds unless said otherwise."""

    #: Times that a fault is repeated on one stage.
    rounds: int
    #: Work between two rounds, at most.
    between: float
    #: How long a broker is away, a connection silent, an alarm on.
    outage: float
    #: How long a node is stopped.
    stopped: float
    #: RabbitMQ 4.3's consumer_disconnected_timeout (milliseconds); None: its default.
    disconnected: int | None
    #: Tasks of a backlog: on SQLite, on RabbitMQ.
    backlog: int
    backlog_rabbitmq: int
    #: Other tasks a second, where a fault wants them.
    traffic: int
    #: How long schedules are watched.
    scheduled: float
    #: Producers of unique tasks that are killed.
    kills: int
    #: Tasks with a limit, and the workers that have them.
    limited: int
    limited_workers: int
    #: How long nothing at all may happen before what is missing is lost.
    patience: float


class Result(msgspec.Struct, frozen=True):
    """One line of the table."""

    fault: str
    broker: str
    tasks: int = 0
    #: Safe tasks that neither ran to their end nor are dead letters.
    lost: int = 0
    #: Safe tasks that began more than once.
    doubled: int = 0
    dead: int = 0
    #: Tasks whose `enqueue` raised: stored or not.
    unknown: int = 0
    #: Seconds from the end of the fault to the first task that began after it.
    recovered: float | None = None
    #: Seconds from the end of the fault until all that was stored by then was done.
    done: float | None = None
    #: The longest that a task waited from being stored to its end, outage and all (seconds).
    longest: float | None = None
    note: str = ""
    #: The fault could not be played here.
    skipped: bool = False
    #: Something hung or raised: as bad as a loss.
    failed: bool = False


class Target(msgspec.Struct, frozen=True):
    """A broker to play on."""

    kind: str
    url: str
    node: Node | None = None

    @property
    def version(self) -> str:
        return self.kind.removeprefix("rabbitmq-")

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return Path(self.url.removeprefix("sqlite:///"))


class Stage:
    """One fault on one broker."""

    def __init__(self, target: Target, folder: Path, profile: Profile, seed: str) -> None:
        self.target = target
        self.folder = folder
        self.profile = profile
        self.chance = random.Random(seed)
        self.book = Book(folder)
        self.workers: list[Worker] = []
        self.producers: list[Program] = []
        #: When the fault ended (Unix time).
        self.ended: float | None = None
        self.note = ""
        #: Safe tasks that an operator deleted.
        self.deleted: set[str] = set()
        self.dead: set[str] = set()
        #: Safe tasks that are left in the queue on purpose.
        self.queued = 0
        #: Where `settled` looks and new processes connect, unless told otherwise.
        self.url = target.url
        #: What the queue must come to at the end, besides all safe tasks being done.
        self.must_be_empty = True
        #: Whether the producers delay some tasks, have some fail at first, and wait for results.
        self.is_mixed = False
        self._ledger = Ledger(self.book.runs)
        self._outputs = 0

    @contextmanager
    def busy(self, *options: str, url: str | None = None, workers: int = 2) -> Iterator[None]:
        """Producers and workers at work; left when all is done that was safely enqueued. ``url``: theirs."""
        url = url or self.url
        try:
            for _ in range(2):
                self.add_producer(url)
            for _ in range(workers):
                self.add_worker(*options, url=url)
            self.wait_until_ready()
            self.wait_for(lambda: self.fresh(0) >= _FRESH, "the first tasks are done")
            yield
            self.settled()
        finally:
            self.close()

    def wait_until_ready(self) -> None:
        for worker in self.workers:
            self.wait_for(partial(_is_ready, worker), "the workers are ready")

    def add_worker(self, *options: str, url: str | None = None, app: str = APP) -> Worker:
        # Of an option that is given twice the last one counts.
        given = ("--concurrency", "8", "--grace", "10", *options)
        worker = Worker(url or self.url, self._ledger, *given, app=app, environment=self._environment())
        self.workers.append(worker)
        return worker

    def add_producer(self, url: str | None = None) -> Program:
        self._outputs += 1
        producer = Program(
            ["-m", "chaos.producer", url or self.url, str(self.chance.randrange(10**9))],
            self.folder / f"producer-{self._outputs}.log",
            self._environment(),
        )
        self.producers.append(producer)
        return producer

    def pause(self, longest: float | None = None) -> None:
        """Let them work until a random moment."""
        time.sleep(self.chance.uniform(0.05, longest or self.profile.between))

    def fault_ended(self) -> None:
        self.ended = time.time()

    def fresh(self, since: float) -> int:
        self.book.read()
        return self.book.fresh(since)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Until the condition holds. Raises Hung when nothing is written to the ledger for too long."""
        lines, deadline, limit = -1, 0.0, time.monotonic() + _LIMIT
        while not condition():
            self.book.read()
            if self.book.lines != lines:
                lines, deadline = self.book.lines, time.monotonic() + self.profile.patience
            if time.monotonic() > min(deadline, limit):
                raise Hung(f"it was waited in vain until {what}; last sign of life {lines} lines into the ledger")
            time.sleep(_LOOK)

    def settled(self) -> None:
        """Wait until work goes on after the fault, then until everything is done."""
        ended = self.ended = self.ended or time.time()
        self.wait_for(lambda: self.fresh(ended) >= _FRESH, "tasks enqueued after the fault are done")
        self.stop_producers()
        self.drain()
        self.stop_workers()

    def drain(self) -> None:
        """Wait until each safe task is done, dead or deleted, and the queue is empty."""
        with suppress(Hung):  # then they are lost, and the table says so
            self.wait_for(self._all_accounted_for, "all tasks are done")
        if self.must_be_empty:
            try:
                self.wait_for(self._is_empty, "the queue is empty")
            except Hung as hung:
                raise Hung(f"{hung}; it has {self._left()}") from hung

    def put(self, task: Task[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[str]:
        """Enqueue from here; safe."""

        async def run() -> list[str]:
            app.client.connect_to(self.url)
            try:
                return [handle.id for handle in await task.enqueue_many(calls)]
            finally:
                await app.close()

        ids = asyncio.run(run())
        self.book.safe.update(dict.fromkeys(ids, time.time()))
        return ids

    def stop_producers(self) -> None:
        producers, self.producers = self.producers, []
        for producer in producers:
            producer.signal(signal.SIGTERM)
        for producer in producers:
            code = producer.exit_code(ENQUEUE_TIMEOUT * 2 + (RESULTS if self.is_mixed else 0.0))
            if code:
                raise Hung(f"a producer ended with code {code}: {producer.output[-2000:]}")

    def stop_workers(self) -> None:
        self.wait_until_ready()  # before, a worker has no handler for the signal
        workers, self.workers = self.workers, []
        for worker in workers:
            if worker.process.poll() is None:
                worker.signal(signal.SIGTERM)
        for worker in workers:
            code = worker.exit_code(30)
            if code:
                raise Hung(f"a worker ended with code {code}: {worker.output[-2000:]}")

    def results(self) -> str:
        """How many results came that producers waited for. Raises Hung when one did not."""
        missing = self.book.awaited - self.book.answered
        answered = len(self.book.answered)
        if missing:
            raise Hung(f"{len(missing)} results were waited for in vain, {answered} came: {sorted(missing)[:3]}")
        return f"{answered} results came"

    @contextmanager
    def traffic(self) -> Iterator[None]:
        """Other tasks and their results beside those of the book; left when all of them have ended."""
        log = self.folder / "traffic.log"
        options = ("--concurrency", "256", "--prefetch", "1000")
        arguments = ["-m", "chaos.traffic", self.url, str(self.profile.traffic)]
        with (
            Worker(
                self.url, Ledger(self.folder / "traffic-runs"), *options, app=f"{ROOT / 'chaos' / 'traffic.py'}:app"
            ) as worker,
            Program(arguments, log, self._environment()) as producer,
        ):
            yield
            producer.signal(signal.SIGTERM)
            code = producer.exit_code(_LIMIT)
            said = producer.output.strip().rpartition("\n")[2]
            if code or not said.endswith(" 0 results missing"):
                raise Hung(f"the other tasks' producer ended with code {code}: {producer.output[-2000:]}")
            self.wait_for(lambda: self._is_empty(TRAFFIC), f"the queue of the other tasks is empty ({said})")
            worker.signal(signal.SIGTERM)
            if worker.exit_code(30):
                raise Hung(f"the other tasks' worker ended so: {worker.output[-2000:]}")
            self.note = said

    def close(self) -> None:
        for program in (*self.producers, *self.workers):
            with suppress(ProcessLookupError):
                os.kill(program.pid, signal.SIGCONT)
            program.kill_group()
        self.producers, self.workers = [], []

    def result(self, fault: str) -> Result:
        self.book.read()
        began, finished = None, None
        if self.ended is not None:
            began, finished = self.book.first_start(self.ended), self.book.last_end(self.ended)
        ended = self.ended or 0.0
        return Result(
            fault,
            self.target.kind,
            tasks=len(self.book.safe),
            lost=max(0, len(self.book.undone() - self.dead - self.deleted) - self.queued),
            doubled=self.book.doubled(),
            dead=len(self.dead & set(self.book.safe)),
            unknown=len(self.book.unknown) + self.book.refused,
            recovered=None if began is None else began - ended,
            done=None if finished is None else max(0.0, finished - ended),
            longest=self.book.longest_wait(),
            note=self.note,
        )

    def dead_letters(self) -> Sequence[DeadLetter]:
        letters = self.ask(lambda broker: broker.dead_letters.read(QUEUE, limit=100_000))
        self.dead.update(letter.envelope.id for letter in letters)
        return letters

    def stats(self, queue: str = QUEUE) -> QueueStats | None:
        found = self.ask(lambda broker: broker.queues.stats([queue]))
        return next((one for one in found if one.name == queue), None)

    def ask(self, question: Callable[[Broker], Awaitable[T]]) -> T:
        return ask(self.url, question)

    def _all_accounted_for(self) -> bool:
        self.book.read()
        missing = self.book.undone() - self.dead - self.deleted
        if missing:
            with suppress(BrokerError):
                self.dead_letters()
        return not missing - self.dead

    def _left(self) -> str:
        try:
            return repr(self.stats())
        except BrokerError as error:
            return f"an unknown number of tasks: {error}"

    def _is_empty(self, queue: str = QUEUE) -> bool:
        with suppress(BrokerError):
            stats = self.stats(queue)
            return stats is None or stats.ready == stats.running == stats.delayed == 0
        return False

    def _environment(self) -> dict[str, str]:
        mixed = {"MIXED": "1"} if self.is_mixed else {}
        return {"SENT": str(self.book.sent), "LEDGER": str(self.book.runs), "PYTHONPATH": str(ROOT), **mixed}


def _is_ready(worker: Worker) -> bool:
    return READY in worker.output


def ask(url: str, question: Callable[[Broker], Awaitable[T]]) -> T:
    """One question, on a connection of its own."""

    async def run() -> T:
        broker = connect(url, timeout=20.0)
        try:
            return await question(broker)
        finally:
            await broker.close()

    return asyncio.run(run())
