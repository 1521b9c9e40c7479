"""How long the file keeps what became of tasks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from leveret.brokers.sqlite import SQLiteBroker
from leveret.model import Envelope, Queue, Succeeded, new_id
from leveret.model.status import settled
from leveret.testing.bench import batches_of

if TYPE_CHECKING:
    from pathlib import Path

WORK = Queue("work")
HOUR = 3_600.0


def task() -> Envelope:
    return Envelope(new_id(), "work", "say", b"{}", enqueued_at=time.time())


async def run(broker: SQLiteBroker, envelope: Envelope, ago: float) -> None:
    """As a worker does, whose clock was that of ``ago`` seconds."""
    await broker.publish([envelope])
    async with broker.consume([WORK], credit=1) as consumer:
        (delivery,) = await anext(batches_of(consumer))
        outcome = Succeeded(b"1")
        await broker.settle([(delivery, outcome)], [settled(envelope, "say", outcome, time.time() - ago)])


async def test_workers_say_how_long(tmp_path: Path) -> None:
    """Others may not know it: the command line cancels, puts back and looks round with the default of an hour."""
    worker = SQLiteBroker(tmp_path / "tasks.db", timeout=20, keep=24 * HOUR)
    operator = SQLiteBroker(tmp_path / "tasks.db", timeout=20)
    await worker.declare([WORK])
    old = [task() for _ in range(8)]
    for envelope in old:
        await run(worker, envelope, ago=2 * HOUR)
    for _ in range(4):
        waits = task()
        await operator.publish([waits])
        await operator.control.cancel(waits.id)
    await operator.queues.stats()
    assert len(await operator.statuses.read([envelope.id for envelope in old])) == 8
    await operator.close()
    await worker.close()


async def test_what_is_older_goes(tmp_path: Path) -> None:
    """Some with each outcome, so that no settlement is slow for it."""
    broker = SQLiteBroker(tmp_path / "tasks.db", timeout=20, keep=HOUR)
    await broker.declare([WORK])
    old = [task() for _ in range(6)]
    for envelope in old:
        await run(broker, envelope, ago=0.5 * HOUR)
    broker_later = SQLiteBroker(tmp_path / "tasks.db", timeout=20, keep=0.25 * HOUR)
    left = []
    for _ in range(3):
        await run(broker_later, task(), ago=0.0)
        left.append(len(await broker.statuses.read([envelope.id for envelope in old])))
    assert left == [2, 0, 0]
    await broker.close()
    await broker_later.close()
