"""Outcomes on their way into an SQLite file: what shares a transaction, and what does not suffer from that."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from leveret.brokers.sqlite import consumer as consumer_module
from leveret.brokers.sqlite.consumer import Lease
from leveret.brokers.sqlite.wakeup import WakeUp
from leveret.errors import BrokerError, LeaseLost
from leveret.model import DeadLettered, Retrying, Succeeded
from leveret.model.status import settled
from leveret.testing.bench import batches_of
from tests.unit.brokers.sqlite.test_sqlite import WORK, busy, counts, envelope, next_batch, opened, remove

if TYPE_CHECKING:
    from pathlib import Path

    from leveret.model import Outcome


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


async def test_one_transaction_settles_and_claims(
    path: Path, transactions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own looks at the file would share the transaction, or be one more: no second round comes, and the first one,
    # asked for when it registered, is over when a later request is answered.
    monkeypatch.setattr(consumer_module, "ROUND", 3_600.0)
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        await broker.publish([envelope(), envelope()])
        batches = batches_of(consumer)
        (first,) = await next_batch(batches)
        await broker.queues.stats()
        transactions.clear()
        await broker.settle([(first, Succeeded())])
        (second,) = await next_batch(batches)
        assert transactions == [1]
        await broker.settle([(second, Succeeded())])


async def test_outcomes_that_wait_together_are_one_request(path: Path, transactions: list[int]) -> None:
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=9) as consumer:
        await broker.publish([envelope() for _ in range(9)])
        batch = await next_batch(batches_of(consumer))
        await broker.queues.stats()
        transactions.clear()
        async with busy(broker):
            settling = [asyncio.create_task(broker.settle([(delivery, Succeeded())])) for delivery in batch]
            await asyncio.sleep(0)
        await asyncio.gather(*settling)
        assert sum(transactions) < 9
        assert await counts(broker) == (0, 0, 0)


async def test_who_does_not_know_yet_that_it_lost_a_task_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease looks held: only the file tells that the task is another one's, and that it has ended."""
    monkeypatch.setattr(WakeUp, "is_there", True)  # it does not see that its bell was deleted
    task = envelope()
    async with opened(path, WORK) as broker, opened(path) as other, broker.consume([WORK], credit=1) as consumer:
        await broker.publish([task])
        (stale,) = await next_batch(batches_of(consumer))
        remove(path.with_name("leveret.db-consumers"))
        async with other.consume([WORK], credit=1) as living:
            (delivery,) = await next_batch(batches_of(living))
            await other.settle([(delivery, Succeeded(b"1"))], [settled(task, "task", Succeeded(b"1"), time.time())])
            assert stale.lease.held
            with pytest.raises(LeaseLost):
                await broker.settle(
                    [(stale, DeadLettered("no"))], [settled(task, "task", DeadLettered("no"), time.time())]
                )
        (status,) = await other.statuses.read([task.id])
        assert status.state == "succeeded"


async def test_an_outcome_that_cannot_be_stored_keeps_no_other_from_it(path: Path) -> None:
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=3) as consumer:
        await broker.publish([envelope() for _ in range(3)])
        batch = await next_batch(batches_of(consumer))
        outcomes: list[Outcome] = [Succeeded(), Retrying("\ud800"), Succeeded()]
        async with busy(broker):
            calls = [broker.settle([pair]) for pair in zip(batch, outcomes, strict=True)]
            settling = asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0)
        results = await settling
        assert (results[0], results[2]) == (None, None)
        assert isinstance(results[1], BrokerError)
        assert await counts(broker) == (0, 1, 0)


async def test_what_nobody_has_read_yet_is_not_waited_for(path: Path) -> None:
    """A transaction waits for more outcomes only while tasks that were read are not settled."""
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=None) as consumer:
        await broker.publish([envelope() for _ in range(10)])
        batch = await next_batch(batches_of(consumer))
        await broker.publish([envelope() for _ in range(5)])
        await broker.queues.stats()  # what was dealt has arrived
        (lease,) = {delivery.lease for delivery in batch}
        assert isinstance(lease, Lease)
        assert (lease.unsettled, lease.in_hand) == (15, len(batch))
        await broker.settle([(delivery, Succeeded()) for delivery in batch])
        assert (lease.unsettled, lease.in_hand) == (15 - len(batch), 0)
