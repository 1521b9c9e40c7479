"""Any order of operations: each published task is in exactly one of ready, delayed, running, done and dead.

A state machine does to a broker what programs do, and keeps its own books. After every step the broker's counts, its
dead letters and what its consumers hold must be what the books say. The clock is the test's: a minute takes no time.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from leveret.brokers import memory
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.brokers.sqlite import SQLiteBroker, consumer, dead_letters, dealing, registrations, store
from leveret.errors import LeaseLost, QueueFull
from leveret.model import (
    DeadLettered,
    Delivery,
    Envelope,
    Outcome,
    Queue,
    QueueStats,
    Released,
    Retrying,
    Settlement,
    Succeeded,
)
from leveret.testing.bench import batches_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from leveret.brokers import Broker, Consumer

QUEUES = {queue.name: queue for queue in (Queue("plain"), Queue("bounded", max_length=3))}
OUTCOMES: st.SearchStrategy[list[Outcome]] = st.lists(
    st.sampled_from(
        [
            Succeeded(),
            Retrying("ValueError: no"),
            Retrying("ValueError: no", delay=5.0),
            DeadLettered("no"),
            Released(),
        ]
    ),
    min_size=1,
    max_size=3,
)
MOST_TAKERS = 3
#: One of whatever there is. Nothing is drawn from what there is: a broker's order and time must not change the steps.
ANY = st.integers(0, 11)
#: How long a broker may take to agree with the books (seconds).
PATIENCE = 10.0


class Clock:
    """The time of the broker's modules and of the loop: the real one, and what was skipped."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def time(self) -> float:
        return time.time() + self.skipped

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped


class Loop(asyncio.SelectorEventLoop):
    """A loop by that clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def time(self) -> float:
        return self._clock.monotonic()


class Task:
    """What the books say of a task."""

    def __init__(self, queue: str, due: float) -> None:
        self.queue = queue
        self.due = due
        self.state = "waiting"
        self.attempt = 1
        self.returns = 0


class Taker:
    """A consumer, as a program of its own has it."""

    def __init__(self, broker: Broker, queues: Sequence[str], credit: int | None) -> None:
        self.broker = broker
        self.queues = queues
        self.credit = credit
        self.came: list[Delivery] = []
        self.holds: dict[str, Delivery] = {}
        self.leaving = AsyncExitStack()

    async def start(self) -> None:
        context = self.broker.consume([QUEUES[name] for name in self.queues], credit=self.credit)
        self.consumer = await self.leaving.enter_async_context(context)
        self.reading = asyncio.create_task(self._read(self.consumer))

    async def _read(self, consumer: Consumer) -> None:
        async for batch in batches_of(consumer):
            self.came.extend(batch)

    def has_credit(self, queue: str) -> bool:
        held = sum(delivery.envelope.queue == queue for delivery in self.holds.values())
        return queue in self.queues and (self.credit is None or held < self.credit)

    async def hang_up(self) -> None:
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)


class Machine(RuleBasedStateMachine):
    """The operations, and the books."""

    modules: Sequence[Any]

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.patch = pytest.MonkeyPatch()
        for module in self.modules:
            self.patch.setattr(module, "time", self.clock)
        self.loop = Loop(self.clock)
        self.numbers = itertools.count()
        self.tasks: dict[str, Task] = {}
        self.takers: list[Taker] = []
        self.gone: list[Taker] = []
        #: Deliveries that are nobody's any more.
        self.stale: list[Delivery] = []
        self.broker = self.open()

    def open(self) -> Broker:
        raise NotImplementedError

    async def die(self, taker: Taker) -> None:
        """What the death of the consumer's process, or of its connection, leaves behind."""
        raise NotImplementedError

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize(credit=st.sampled_from((1, 2, None)))
    def begin(self, credit: int | None) -> None:
        self.run(self.broker.declare(list(QUEUES.values())))
        self.publish("plain", [None, None, 5.0])
        self.publish("bounded", [None, None])
        self.consume(list(QUEUES), credit)

    @rule(
        queue=st.sampled_from(sorted(QUEUES)),
        delays=st.lists(st.sampled_from((None, None, 5.0, 60.0)), min_size=1, max_size=3),
    )
    def publish(self, queue: str, delays: list[float | None]) -> None:
        now = self.clock.time()
        dues = [None if delay is None else now + delay for delay in delays]
        envelopes = [Envelope(f"{next(self.numbers):04}", queue, "task", b"{}", due=due) for due in dues]
        limit = QUEUES[queue].max_length
        full = limit is not None and self.run(self.stats())[queue].ready + len(envelopes) > limit
        try:
            self.run(self.broker.publish(envelopes))
        except QueueFull:
            assert full
        else:
            assert not full
            self.tasks |= {one.id: Task(queue, one.due or 0.0) for one in envelopes}

    @rule(queues=st.sampled_from((["plain"], ["bounded"], ["plain", "bounded"])), credit=st.sampled_from((1, 2, None)))
    def consume(self, queues: list[str], credit: int | None) -> None:
        if len(self.takers) == MOST_TAKERS:
            return
        taker = Taker(self.open(), queues, credit)
        self.run(taker.start())
        self.takers.append(taker)

    @rule(which=ANY, outcomes=OUTCOMES, with_stale=st.booleans())
    def settle(self, which: int, outcomes: list[Outcome], with_stale: bool) -> None:
        """Some of what a consumer holds, perhaps together with something that it does not hold any more."""
        busy = [taker for taker in self.takers if taker.holds]
        if not busy:
            return
        taker = busy[which % len(busy)]
        stale = self.stale[-1:] if with_stale else []
        pairs = [(taker.holds.pop(id_), outcome) for id_, outcome in zip(sorted(taker.holds), outcomes, strict=False)]
        before = self.clock.time()
        lost = self.run(self.settled(taker.broker, [*pairs, *((delivery, Succeeded()) for delivery in stale)]))
        assert lost == [delivery.envelope.id for delivery in stale]
        for delivery, outcome in pairs:
            self.stale.append(delivery)
            self.end(self.tasks[delivery.envelope.id], outcome, before)

    @rule(which=ANY, outcomes=OUTCOMES)
    def settle_more(self, which: int, outcomes: list[Outcome]) -> None:
        """The same, so that it happens often."""
        self.settle(which, outcomes, with_stale=False)

    async def settled(self, broker: Broker, settlements: Sequence[Settlement]) -> list[str]:
        """Settle; the ids of those that were not the caller's."""
        try:
            await broker.settle(settlements)
        except LeaseLost as error:
            return list(error.ids)
        return []

    def end(self, task: Task, outcome: Outcome, before: float) -> None:
        if isinstance(outcome, Succeeded):
            task.state = "done"
        elif isinstance(outcome, DeadLettered):
            task.state = "dead"
        else:
            task.state = "waiting"
        if isinstance(outcome, Retrying):
            task.attempt, task.returns = task.attempt + 1, 0
            task.due = before + outcome.delay if outcome.delay else 0.0

    @rule(which=ANY, outcomes=OUTCOMES)
    def settle_again(self, which: int, outcomes: list[Outcome]) -> None:
        if not self.stale:
            return
        delivery = self.stale[-1 - which % len(self.stale)]
        assert self.run(self.settled(self.broker, [(delivery, outcomes[0])])) == [delivery.envelope.id]

    @rule(which=ANY, crash=st.booleans())
    def end_a_consumer(self, which: int, crash: bool) -> None:
        """What it has not settled goes back."""
        if not self.takers:
            return
        taker = self.takers.pop(which % len(self.takers))
        self.run(self.die(taker) if crash else self.leave(taker))
        self.take_back(taker)

    async def leave(self, taker: Taker) -> None:
        await taker.consumer.stop()
        for _ in range(5):  # what was on its way is read
            await asyncio.sleep(0)
        await taker.leaving.aclose()
        await taker.reading
        await taker.broker.close()

    def take_back(self, taker: Taker) -> None:
        for delivery in taker.came:
            self.take(taker, delivery)
        taker.came.clear()
        for id_ in taker.holds:
            self.tasks[id_].state = "waiting"
            self.tasks[id_].returns += 1
        self.stale += taker.holds.values()

    @rule(seconds=st.sampled_from((1.0, 6.0, 61.0)))
    def time_passes(self, seconds: float) -> None:
        self.clock.skipped += seconds

    @rule(queue=st.sampled_from(sorted(QUEUES)), put_back=st.booleans(), first=st.integers(0, 2))
    def decide_about_the_dead(self, queue: str, put_back: bool, first: int) -> None:
        dead = self.ids(queue, "dead")
        chosen = [*dead[first : first + 2], "nobody"]
        decide = self.broker.dead_letters.retry if put_back else self.broker.dead_letters.drop
        assert sorted(self.run(decide(queue, chosen))) == sorted(set(chosen) & set(dead))
        for id_ in set(chosen) & set(dead):
            task = self.tasks[id_]
            task.state = "waiting" if put_back else "done"
            task.attempt, task.returns, task.due = 1, 0, 0.0

    @invariant()
    def each_is_in_one_place(self) -> None:
        self.run(self.agree())

    async def agree(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            for taker in self.takers:
                for delivery in taker.came:
                    self.take(taker, delivery)
                taker.came.clear()
            stats = await self.stats()
            wrong = [problem for queue in QUEUES for problem in self.compare(queue, stats[queue])]
            if not wrong:
                break
            assert time.monotonic() < deadline, wrong
            await asyncio.sleep(0.001)
        for queue in QUEUES:
            letters = await self.broker.dead_letters.read(queue, limit=1_000)
            assert sorted(letter.envelope.id for letter in letters) == self.ids(queue, "dead")

    def take(self, taker: Taker, delivery: Delivery) -> None:
        """A delivery came: of a task that waited, and not before its time."""
        envelope, task = delivery.envelope, self.tasks[delivery.envelope.id]
        assert task.state == "waiting", f"{envelope.id} is delivered, and is {task.state}"
        assert task.due <= self.clock.time()
        assert (envelope.queue, envelope.attempt, delivery.returns) == (task.queue, task.attempt, task.returns)
        assert taker.has_credit(envelope.queue)
        task.state = "running"
        taker.holds[envelope.id] = delivery

    def compare(self, queue: str, stats: QueueStats) -> list[str]:
        """Where the broker and the books differ: now, or for as long as something is on its way."""
        waiting, now = self.ids(queue, "waiting"), self.clock.time()
        not_due = sum(self.tasks[id_].due > now for id_ in waiting)
        idle = any(taker.has_credit(queue) for taker in self.takers)
        checks: dict[str, Callable[[], bool]] = {
            "running": lambda: stats.running == len(self.ids(queue, "running")),
            "dead": lambda: stats.dead == len(self.ids(queue, "dead")),
            "ready and delayed": lambda: stats.ready + stats.delayed == len(waiting),
            "delayed": lambda: stats.delayed >= not_due,
            "ready beside an idle consumer": lambda: not (idle and stats.ready),
            "due beside an idle consumer": lambda: not (idle and stats.delayed > not_due),
            "consumers": lambda: stats.consumers == sum(queue in taker.queues for taker in self.takers),
        }
        return [f"{queue}: {name}: {stats}" for name, is_right in checks.items() if not is_right()]

    def ids(self, queue: str, state: str) -> list[str]:
        return sorted(id_ for id_, task in self.tasks.items() if (task.queue, task.state) == (queue, state))

    def held(self) -> bool:
        return any(taker.holds for taker in self.takers)

    async def stats(self) -> dict[str, QueueStats]:
        return {one.name: one for one in await self.broker.queues.stats()}

    def teardown(self) -> None:
        async def end() -> None:
            for taker in self.takers:
                await taker.hang_up()
            for taker in self.takers + self.gone:
                await taker.leaving.aclose()
                await taker.broker.close()
            await self.broker.close()

        self.run(end())
        self.loop.close()
        self.patch.undo()


class MemoryMachine(Machine):
    modules = (memory,)

    def __init__(self) -> None:
        self.store = MemoryStore()
        super().__init__()

    def open(self) -> Broker:
        return MemoryBroker(self.store)

    async def die(self, taker: Taker) -> None:
        """(All that a process of its own could do is to go.)"""
        await taker.hang_up()
        await taker.leaving.aclose()


class SQLiteMachine(Machine):
    modules = (consumer, dead_letters, dealing, registrations, store)

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="leveret-states-"))
        super().__init__()

    def open(self) -> Broker:
        return SQLiteBroker(self.folder / "leveret.db", timeout=20.0)

    async def die(self, taker: Taker) -> None:
        """The kernel closes the bell; nobody takes it down, and nobody says good-bye."""
        await taker.hang_up()
        taker.consumer._looking.cancel()  # type: ignore[attr-defined]
        registration = taker.consumer._registration  # type: ignore[attr-defined]
        bell, registration._wake_up = registration._wake_up, None
        bell.let_go()
        self.gone.append(taker)

    @rule()
    def open_again(self) -> None:
        """Nothing is only in a program's memory."""
        self.run(self.broker.close())
        self.broker = self.open()

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


#: The same steps in every run. They are not shrunk, which would take longer than a test may: each wait is in real time.
PROFILE = settings(
    max_examples=100,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestMemory = MemoryMachine.TestCase
TestMemory.settings = PROFILE
TestSQLite = SQLiteMachine.TestCase
TestSQLite.settings = settings(PROFILE, max_examples=30)
