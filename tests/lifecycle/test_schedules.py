"""Schedules, kept by real workers that are killed: no instant is left out, and none comes twice."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret import every
from leveret.brokers import connect
from leveret.model import Envelope, Put, Schedule
from tests.support import schedules_app
from tests.support.cluster import Cluster
from tests.support.waiting import PATIENCE, until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from leveret.model import ScheduleRow
    from tests.conftest import Place

APP = f"{Path(schedules_app.__file__)}:app"
MESSAGE = Envelope("", "work", "digest", b'{"args":[1],"kwargs":{}}')
#: How often a worker is killed, and after how many instants the next one is.
KILLS, BETWEEN = 4, 3
#: So many tasks the others store while a node is parted from them; and how long they may take, with three nodes on two
#: busy cores (seconds).
MEANWHILE, LONG = 8, 120.0


def instants(ledger: Ledger, task: str = "tick") -> list[int]:
    return sorted(int(line.split()[1]) for line in ledger.lines_of(task))


def ids(ledger: Ledger, task: str = "tick") -> list[str]:
    return [line.split()[2] for line in ledger.lines_of(task)]


def stored_by(worker: Worker) -> list[float]:
    """The instants of the tasks that it says it has stored (Unix time)."""
    names = re.findall(r"task digest@(\S+) is stored", worker.output)
    return [datetime.fromisoformat(name).timestamp() for name in names]


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


@pytest.mark.rabbitmq
@pytest.mark.timeout(400)  # three nodes start on two busy cores
@pytest.mark.parametrize("version", ["3.10", "4"])
async def test_a_minority_stores_nothing_and_the_others_go_on(version: str, ledger: Ledger) -> None:
    """The keeper's node is parted from the other two for a while, and comes back."""
    # The default, a minute, would hold up what the parted worker was about to run.
    config = {"consumer_disconnected_timeout": 2_000} if version == "4" else {}
    with Cluster(version, config=config) as cluster:
        broker = connect(cluster.nodes[0].url, timeout=60.0)
        made = Schedule("digest", every(seconds=1, catch_up="all", overlap="allow"), MESSAGE)
        away, workers = cluster.nodes[2], list[Worker]()
        try:
            for node in (away, *cluster.others(away)):
                workers.append(Worker(node.url, ledger, "--log-level", "DEBUG", app=APP).ready())
                if node is away:
                    await broker.schedules.ask(Put(made))
                    await asyncio.to_thread(ledger.wait_for, "digest-1", 2)
            await asyncio.to_thread(ledger.wait_for, "digest-1", 5)
            parted, *others = workers
            assert len(stored_by(parted)) > 1
            assert not [instant for worker in others for instant in stored_by(worker)]
            await asyncio.to_thread(cluster.cut_off, away)
            cut = time.time()

            def meanwhile() -> list[float]:
                return [instant for worker in others for instant in stored_by(worker) if instant > cut]

            await until(lambda: len(meanwhile()) >= MEANWHILE, "the others go on", LONG)
            healed = time.time()
            await asyncio.to_thread(cluster.rejoin, away)
            await asyncio.to_thread(cluster.wait_for_running, 3)
            await asyncio.to_thread(ledger.wait_for, "digest-1", ledger.count("digest-1") + 20)
        finally:
            for worker in workers:
                worker.kill_group()
            await broker.close()
    assert not [instant for instant in stored_by(parted) if cut < instant < healed]
    seen = instants(ledger, "digest-1")
    assert sorted(set(seen)) == list(range(seen[0], seen[-1] + 1))
    assert len(set(ids(ledger, "digest-1"))) == len(set(seen))
    late = max(float(line.split()[3]) for line in ledger.lines_of("digest-1"))
    print(f"the latest began {late:.1f} s late; {len(seen) - len(set(seen))} ran twice")  # how late: docs/adr/0041
