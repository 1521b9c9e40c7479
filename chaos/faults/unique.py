"""What happens to unique keys when producers die."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from chaos.book import Run
from chaos.faults.fault import Fault
from chaos.stage import ROOT, Hung
from chaos.unique import QUEUE, keyed
from leveret.brokers import connect
from leveret.model import UNIQUE_KEY
from leveret.testing.bench import batches_of
from tests.support.workers import Program

if TYPE_CHECKING:
    from chaos.stage import Stage
    from leveret.brokers import Broker
    from leveret.brokers.base import Consumer

#: A claim whose program died is completed so soon (seconds); see the guarantees.
_COMPLETED = 35.0
_LOOK = 0.05
#: Keys that are asked for at once.
_AT_ONCE = 200


def producers_killed(stage: Stage) -> None:
    """kill -9 of producers at random moments. Each key that is taken has its one task, at the latest when stated."""
    base, kills = stage.chance.getrandbits(40), stage.profile.kills
    arguments = [stage.url, str(base), str(kills), str(stage.chance.getrandbits(20))]
    program = Program(["-m", "chaos.unique", *arguments], stage.folder / "killed.log", {"PYTHONPATH": str(ROOT)})
    stage.producers.append(program)  # ended with the stage
    if program.exit_code(kills + 60.0):
        raise Hung(f"the producers' program failed: {program.output[-2000:]}")
    stage.fault_ended()
    keys = range(base, base + int(program.output))
    took = asyncio.run(_look(stage, keys))
    stage.note = f"{kills} producers killed; each of {len(keys)} keys had its one task {took:.1f} s later"


async def _look(stage: Stage, keys: range) -> float:
    """Ask who has each key, and wait until all those tasks are there; how long that took."""
    broker = connect(stage.url, timeout=30.0)
    try:
        await broker.declare([QUEUE])
        async with broker.consume([QUEUE], credit=None) as consumer:
            return await _find(stage, broker, consumer, keys)
    finally:
        await broker.queues.purge(QUEUE.name, force=True)
        await broker.close()


async def _find(stage: Stage, broker: Broker, consumer: Consumer, keys: range) -> float:
    found: defaultdict[str, set[str]] = defaultdict(set)

    async def collect() -> None:
        async for deliveries in batches_of(consumer):
            for one in deliveries:
                found[one.envelope.headers[UNIQUE_KEY]].add(one.envelope.id)
                run = stage.book.tasks.setdefault(one.envelope.id, Run())
                run.starts.append(time.time())
                run.ends.append(time.time())

    collecting = asyncio.create_task(collect())

    async def ask(key: int) -> None:
        wanted = keyed(key)
        existing = await broker.publish([wanted], on_conflict="ignore") or {}
        stage.book.safe[existing.get(wanted.id, wanted.id)] = stage.ended or 0.0

    began = time.monotonic()
    try:
        for first in range(0, len(keys), _AT_ONCE):
            await asyncio.gather(*map(ask, keys[first : first + _AT_ONCE]))
        while stage.book.undone() and time.monotonic() - began < _COMPLETED:  # noqa: ASYNC110 - as the ledger is looked at
            await asyncio.sleep(_LOOK)
    finally:
        collecting.cancel()
    doubled = [key for key, ids in found.items() if len(ids) > 1]
    if doubled:
        raise Hung(f"{len(doubled)} keys have two tasks: {doubled[:3]}")
    return time.monotonic() - began


FAULTS = (Fault("unique-killed", "unique tasks; kill -9 of 200 producers at random moments", producers_killed),)
