"""A delivery that was lost comes again: its run, or its outcome, is there already."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import BrokerUnavailable, LeaseLost, Queue
from leveret.brokers import Deliveries
from leveret.brokers.memory import MemoryBroker, MemoryStatuses, MemoryStore
from leveret.model import Succeeded
from leveret.observe.events import TaskSettled
from leveret.testing.bench import batches_of
from leveret.worker import settler as recorder
from tests.support.bench import Bench

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from leveret.model import Delivery, Envelope, Lease, Settlement
    from leveret.model.status import Status


class Forgetful(MemoryBroker):
    """Loses the lease of the first outcome, as a broken connection does, and delivers its task once more."""

    def __init__(self, again: Callable[[Envelope], tuple[Envelope, int]], store: MemoryStore | None = None) -> None:
        super().__init__(store)
        self._again = again
        self._lost: list[Envelope] = []

    def lease(self, delivery: Delivery) -> Lease:
        """What the worker has it by."""
        return delivery.lease

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        await super().settle(settlements, updates)
        if not self._lost:
            self._lost.append(settlements[0][0].envelope)
            envelope, _ = self._again(self._lost[0])
            await self.publish([envelope])
            raise LeaseLost([self._lost[0].id])

    @asynccontextmanager
    async def consume(self, queues: Sequence[Queue], *, credit: int | None, **options: Any) -> AsyncGenerator[Any]:
        async with super().consume(queues, credit=credit, **options) as consumer:
            lost, again, lease = self._lost, self._again, self.lease

            class Counting:
                stop = consumer.stop
                set_credit = consumer.set_credit
                adjusts_credit = consumer.adjusts_credit
                hold_limit = None
                paused: frozenset[str] = frozenset()

                async def __aiter__(self) -> AsyncGenerator[Deliveries]:
                    async for batch in batches_of(consumer):
                        changed = [
                            msgspec.structs.replace(
                                delivery,
                                returns=again(delivery.envelope)[1] if lost else 0,
                                lease=lease(delivery),
                            )
                            for delivery in batch
                        ]
                        yield Deliveries(tuple(changed))

            yield Counting()


async def test_what_has_run_is_not_run_again_when_its_delivery_comes_back() -> None:
    bench = Bench(Forgetful(lambda envelope: (envelope, 1)))
    await bench.put("say", "a")
    async with bench.working():
        settled = await bench.wait_until_settled(2)
    assert bench.done == ["a"]
    assert [event.kept for event in settled] == [False, True]
    assert await bench.counts() == (0, 0, 0)


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(lambda envelope: (envelope, 0), id="never delivered before"),
        pytest.param(lambda envelope: (msgspec.structs.replace(envelope, attempt=2), 1), id="another attempt"),
        pytest.param(lambda envelope: (msgspec.structs.replace(envelope, enqueued_at=1.0), 1), id="another enqueueing"),
        pytest.param(lambda envelope: (msgspec.structs.replace(envelope, body=envelope.body + b" "), 1), id="another"),
    ],
)
async def test_what_only_looks_like_it_runs(again: Callable[[Envelope], tuple[Envelope, int]]) -> None:
    """The same id for something else: a task enqueued again, retried by another worker, or put back by hand."""
    bench = Bench(Forgetful(again))
    await bench.put("say", "a")
    async with bench.working():
        await bench.wait_until_settled(2)
    assert bench.done == ["a", "a"]


class Thin:
    """A lease that ends when the test says so, over the broker's own."""

    def __init__(self, inner: Lease) -> None:
        self.inner = inner
        self.held = True


class Thinned(Forgetful):
    """All its leases are thin; the first delivery comes again as ``again`` says."""

    def lease(self, delivery: Delivery) -> Lease:
        return Thin(delivery.lease)

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        await super().settle([(thick(delivery), outcome) for delivery, outcome in settlements], updates)


def thick(delivery: Delivery) -> Delivery:
    assert isinstance(delivery.lease, Thin)
    return msgspec.structs.replace(delivery, lease=delivery.lease.inner)


def end(delivery: Delivery) -> None:
    assert isinstance(delivery.lease, Thin)
    delivery.lease.held = False


class Deaf(Thinned):
    """Says that it recorded the first outcome, and delivers its task once more; ``cut``: on another connection."""

    def __init__(
        self, again: Callable[[Envelope], tuple[Envelope, int]], store: MemoryStore | None = None, *, cut: bool = True
    ) -> None:
        super().__init__(again, store)
        self._cut = cut
        self.settlements = 0

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        with suppress(LeaseLost):
            await super().settle(settlements, updates)
        for delivery, _ in settlements if self._cut else ():
            end(delivery)
        self.settlements += len(settlements)


@pytest.mark.parametrize(("cut", "runs"), [(True, 1), (False, 2)])
async def test_an_acknowledgment_may_be_lost_with_its_connection(*, cut: bool, runs: int) -> None:
    """Delivered again, the task is acknowledged again and not run. On the same connection it is another task."""
    broker = Deaf(lambda envelope: (envelope, 1), cut=cut)
    bench = Bench(broker)
    await bench.put("say", "a")
    async with bench.working():
        await bench.wait_for(lambda: broker.settlements == 2, "both are settled")
    assert bench.done == ["a"] * runs
    assert len(bench.told(TaskSettled)) == runs
    assert await bench.counts() == (0, 0, 0)


async def test_its_result_stays() -> None:
    broker = Deaf(lambda envelope: (envelope, 1))
    bench = Bench(broker)
    await bench.put("count", "abc")
    async with bench.working() as worker:
        await bench.wait_for(lambda: broker.settlements == 2, "both are settled")
        (settled,) = bench.told(TaskSettled)
        (status,) = await broker.statuses.read([settled.envelope.id])
        del worker
    assert bytes(status.encoded_result) == b"3"


async def test_another_of_its_id_and_length_runs() -> None:
    """A foreign producer may give all its messages one id."""
    broker = Deaf(lambda envelope: (msgspec.structs.replace(envelope, body=envelope.body.replace(b'"a"', b'"b"')), 1))
    bench = Bench(broker)
    await bench.put("say", "a")
    async with bench.working():
        await bench.wait_until_settled(2)
    assert bench.done == ["a", "b"]


async def test_a_dead_letter_is_not_put_there_twice() -> None:
    store = MemoryStore()

    def again(envelope: Envelope) -> tuple[Envelope, int]:
        store.ids.discard(envelope.id)  # or it is taken for the dead one, enqueued again
        return envelope, 1

    broker = Deaf(again, store)
    bench = Bench(broker)
    await bench.put("give_up", "a")
    async with bench.working():
        await bench.wait_for(lambda: broker.settlements == 2, "both are settled")
    assert await bench.counts() == (0, 0, 1)


class Slow(Thinned):
    """Loses the first lease, and delivers the task once more, while the outcome is being recorded."""

    def __init__(self) -> None:
        super().__init__(lambda envelope: (envelope, 1))
        self.taken = 0
        self.gate = asyncio.Event()

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        is_first = not self._lost
        try:
            await super().settle(settlements, updates)
        finally:
            if is_first:
                end(settlements[0][0])
                await self.gate.wait()

    def lease(self, delivery: Delivery) -> Lease:
        self.taken += 1
        return super().lease(delivery)


async def test_a_task_may_come_again_while_its_outcome_is_recorded() -> None:
    broker = Slow()
    bench = Bench(broker)
    await bench.put("say", "a")
    async with bench.working():
        await bench.wait_for(lambda: broker.taken == 2, "it has come again")
        await asyncio.sleep(0)
        broker.gate.set()
        settled = await bench.wait_until_settled(2)
    assert bench.done == ["a"]
    assert [event.kept for event in settled] == [False, True]
    assert await bench.counts() == (0, 0, 0)


class Cut(Thinned):
    """Has what was settled first come again after `cut`: that acknowledgment was lost with its connection."""

    def __init__(self) -> None:
        super().__init__(lambda envelope: (envelope, 1))
        self.settled: list[Settlement] = []

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        await MemoryBroker.settle(self, [(thick(delivery), outcome) for delivery, outcome in settlements], updates)
        self.settled += settlements

    async def cut(self) -> None:
        first, _ = self.settled[0]
        self._lost.append(first.envelope)
        end(first)
        await self.publish([first.envelope])


async def test_a_task_that_is_acknowledged_before_it_runs_may_come_again_when_it_has_run() -> None:
    broker = Cut()
    bench = Bench(broker)
    await bench.put("say_once", "a")
    async with bench.working():
        await bench.wait_until_settled(1)
        await broker.cut()
        await bench.wait_for(lambda: len(broker.settled) == 2, "it is acknowledged again")
    assert bench.done == ["a"]
    assert len(bench.told(TaskSettled)) == 1
    assert await bench.counts() == (0, 0, 0)


class Noting(MemoryStatuses):
    def __init__(self, store: MemoryStore, told: list[Status]) -> None:
        super().__init__(store, 60.0)
        self._told = told

    async def notify(self, updates: Sequence[Status]) -> None:
        self._told += updates


class Robbed(Thinned):
    """Loses each lease while the task runs, to another worker that has done it."""

    def __init__(self) -> None:
        store = MemoryStore()
        super().__init__(lambda envelope: (envelope, 0), store)
        self.told: list[Status] = []
        self.statuses = Noting(store, self.told)

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        self.told += updates
        raise LeaseLost([delivery.envelope.id for delivery, _ in settlements])

    def lease(self, delivery: Delivery) -> Lease:
        self.last = delivery = msgspec.structs.replace(delivery, lease=super().lease(delivery))
        return delivery.lease


async def test_who_has_lost_a_task_tells_no_more_of_it() -> None:
    broker = Robbed()
    bench = Bench(broker)
    await bench.put("wait", "a")
    async with bench.working():
        await bench.wait_for(lambda: broker.told, "it is told that it runs")
        end(broker.last)
        bench.gate.set()
        await bench.wait_until_settled(1)
    assert {status.state for status in broker.told} == {"running"}


class Away(Thinned):
    """Is away when the first outcome comes; by then it has taken the task back, and delivers it again."""

    def __init__(self) -> None:
        super().__init__(lambda envelope: (envelope, 1))
        self.tries = 0

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        self.tries += 1
        if self.tries == 1:
            ((delivery, _),) = settlements
            self._lost.append(delivery.envelope)
            end(delivery)
            await MemoryBroker.settle(self, [(thick(delivery), Succeeded())])
            await self.publish([delivery.envelope])
            raise BrokerUnavailable("away")
        lost = [delivery.envelope.id for delivery, _ in settlements if not delivery.lease.held]
        if lost:
            raise LeaseLost(lost)
        await super().settle(settlements, updates)


async def test_what_comes_again_before_it_is_acknowledged_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``acknowledge="before"``: the delivery that came last is acknowledged, then it runs."""
    monkeypatch.setattr(recorder, "SETTLE_AGAIN", 0.5)
    broker = Away()
    bench = Bench(broker)
    await bench.put("say_once", "a")
    async with bench.working():
        await bench.wait_until_settled(1)
        assert bench.done == ["a"]
        assert broker.tries == 4  # away, lost, acknowledged, and how it ended
    assert await bench.counts() == (0, 0, 0)
