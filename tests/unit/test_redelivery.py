"""A delivery that was lost comes again: its run, or its outcome, is there already."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import LeaseLost, Queue
from leveret.brokers.memory import MemoryBroker
from tests.support.bench import Bench

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from leveret.model import Delivery, Envelope, Lease, Settlement
    from leveret.status import Status


class Forgetful(MemoryBroker):
    """Loses the lease of the first outcome, as a broken connection does, and delivers its task once more."""

    def __init__(self, again: Callable[[Envelope], tuple[Envelope, int]]) -> None:
        super().__init__()
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
                hold_limit = None
                marks = consumer.marks
                paused: frozenset[str] = frozenset()

                async def __aiter__(self) -> AsyncGenerator[Sequence[Delivery]]:
                    async for batch in consumer:
                        yield [
                            msgspec.structs.replace(
                                delivery,
                                returns=again(delivery.envelope)[1] if lost else 0,
                                lease=lease(delivery),
                            )
                            for delivery in batch
                        ]

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


class Deaf(Forgetful):
    """Says that it recorded the first outcome, and delivers its task once more; ``cut``: on another connection."""

    def __init__(self, *, cut: bool) -> None:
        super().__init__(lambda envelope: (envelope, 1))
        self._cut = cut

    def lease(self, delivery: Delivery) -> Lease:
        return Thin(delivery.lease)

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        leases = [delivery.lease for delivery, _ in settlements if isinstance(delivery.lease, Thin)]
        inner = [
            (msgspec.structs.replace(delivery, lease=lease.inner), outcome)
            for (delivery, outcome), lease in zip(settlements, leases, strict=True)
        ]
        with suppress(LeaseLost):
            await super().settle(inner, updates)
        for lease in leases:
            lease.held = not self._cut


@pytest.mark.parametrize(("cut", "runs"), [(True, 1), (False, 2)])
async def test_an_acknowledgment_may_be_lost_with_its_connection(*, cut: bool, runs: int) -> None:
    """Delivered again, the task is acknowledged again and not run. On the same connection it is another task."""
    bench = Bench(Deaf(cut=cut))
    await bench.put("say", "a")
    async with bench.working():
        await bench.wait_until_settled(2)
    assert bench.done == ["a"] * runs
    assert await bench.counts() == (0, 0, 0)
