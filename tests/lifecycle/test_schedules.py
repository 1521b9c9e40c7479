"""Schedules, kept by real workers that are killed: no instant is left out, and none comes twice."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from leveret import every
from leveret.model import Envelope, Put, Schedule
from tests.support import schedules_app
from tests.support.waiting import PATIENCE
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from leveret.model import ScheduleRow
    from tests.conftest import Place

APP = f"{Path(schedules_app.__file__)}:app"
MESSAGE = Envelope("", "work", "digest", b'{"args":[1],"kwargs":{}}')
#: How often a worker is killed, and after how many instants the next one is.
KILLS, BETWEEN = 4, 3


def instants(ledger: Ledger) -> list[int]:
    return sorted(int(line.split()[1]) for line in ledger.lines_of("tick"))


def ids(ledger: Ledger) -> list[str]:
    return [line.split()[2] for line in ledger.lines_of("tick")]


def test_no_instant_is_left_out_or_doubled_whoever_is_killed(place: Place, ledger: Ledger) -> None:
    """Each worker in turn: whoever keeps the schedules is among them."""
    workers = [Worker(place.url, ledger, app=APP).ready() for _ in range(3)]
    try:
        ledger.wait_for("tick", 2)
        for kill in range(KILLS):
            workers[kill % 3].kill_group()
            workers[kill % 3] = Worker(place.url, ledger, app=APP).ready()
            ledger.wait_for("tick", ledger.count("tick") + BETWEEN)
    finally:
        for worker in workers:
            worker.kill_group()
    seen = instants(ledger)
    assert len(set(ids(ledger))) == len(set(seen))
    # A task that ran when its worker was killed may run again; it is the same one.
    assert sorted(set(seen)) == list(range(seen[0], seen[-1] + 1))


async def test_a_task_that_waits_is_not_overlapped(place: Place, ledger: Ledger) -> None:
    """Nobody takes it, as its queue is paused: each further instant is skipped."""
    made = Schedule("digest", every(seconds=3), MESSAGE)  # instants less than two seconds apart may be stored together
    broker = place.open()
    try:
        with Worker(place.url, ledger, app=APP).ready():
            await broker.queues.pause("work")
            await broker.schedules.ask(Put(made))

            async def row() -> ScheduleRow:
                return next(row for row in await broker.schedules.read() if row.name == "digest")

            found = await row()
            async with asyncio.timeout(PATIENCE):
                while found.skipped < 2:
                    await asyncio.sleep(0.2)
                    found = await row()
            assert len(found.recent) == 1
    finally:
        await broker.close()
