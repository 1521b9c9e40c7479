"""What only the SQLite file must bear: a kill at any moment, and a very long queue."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from leveret.brokers import connect
from leveret.brokers.sqlite.dealing import CLAIM
from leveret.model import Queue, Succeeded
from leveret.testing.bench import batches_of
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from pathlib import Path


# Writes each id to its standard output once `enqueue` has returned, in one unbuffered write.
PRODUCER = """
import asyncio, itertools, os, sys
from tests.support.ledger_app import app, say

async def main():
    app.client.connect_to(sys.argv[1])
    async def produce(lane):
        for number in itertools.count():
            text = f"{sys.argv[2]}-{lane}-{number}"
            await say.enqueue(text)
            os.write(1, f"{text}\\n".encode())
    await asyncio.gather(*map(produce, range(4)))

asyncio.run(main())
"""


@pytest.mark.timeout(480)  # more than a hundred processes, on a machine that may be busy
def test_a_hundred_kills(tmp_path: Path, ledger: Ledger) -> None:
    """kill -9 of producers and workers at random moments: every task whose enqueue returned runs."""
    url = f"sqlite:///{tmp_path / 'leveret.db'}"
    moments = random.Random(2)
    confirmed: set[str] = set()
    worker = Worker(url, ledger)
    try:
        for kill in range(100):
            if kill % 10 == 9:
                worker.kill_group()
                worker = Worker(url, ledger)
            producer = subprocess.Popen([sys.executable, "-c", PRODUCER, url, str(kill)], stdout=subprocess.PIPE)
            assert producer.stdout is not None
            first = producer.stdout.readline()
            time.sleep(moments.uniform(0, 0.05))  # the random moment
            producer.send_signal(signal.SIGKILL)
            lines = (first + producer.stdout.read()).decode().split("\n")[:-1]
            producer.stdout.close()
            producer.wait()
            confirmed.update(lines)
        assert len(confirmed) >= 100
        last = worker.ready()
        deadline = time.monotonic() + 60
        while missing := confirmed - {line.removeprefix("said ") for line in ledger.lines()}:
            assert time.monotonic() < deadline, f"{len(missing)} of {len(confirmed)} tasks were lost"
            assert last.process.poll() is None
            time.sleep(0.1)
    finally:
        worker.kill_group()
    with closing(sqlite3.connect(tmp_path / "leveret.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_million_ready_tasks_claim_as_a_thousand(tmp_path: Path) -> None:
    """The same statement over the same index: compared by what SQLite reads, and roughly by time."""
    pages: dict[int, float] = {}
    for count in (1_000, 1_000_000):
        path = tmp_path / f"{count}.db"
        broker = connect(f"sqlite:///{path}")
        await broker.declare([Queue("work")])
        fill(path, count)
        times = []
        async with broker.consume([Queue("work")], credit=1) as consumer:
            async for batch in batches_of(consumer):
                started = time.perf_counter()
                await broker.settle([(delivery, Succeeded()) for delivery in batch])
                times.append(time.perf_counter() - started)
                if len(times) == 200:
                    break
        await broker.close()
        pages[count] = statistics.median(times)
    # A scan of a million rows would take a thousand times as long; the bound only tells a scan from an index.
    assert pages[1_000_000] < pages[1_000] * 10


async def test_a_claim_is_served_by_its_index(tmp_path: Path) -> None:
    """Whatever the priorities: nothing is sorted."""
    path = tmp_path / "leveret.db"
    broker = connect(f"sqlite:///{path}")
    await broker.declare([Queue("work")])
    await broker.close()
    with closing(sqlite3.connect(path)) as database:
        plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {CLAIM}", (1, 10))]
    assert len(plan) == 1
    assert plan[0].startswith("SEARCH task USING")
    assert "INDEX task_ready (queue=?)" in plan[0]


def fill(path: Path, count: int) -> None:
    """Rows as `publish` writes them, all at once."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            "INSERT INTO task (queue, id, name, body, attempt, priority)"
            " WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < ?)"
            " SELECT 1, printf('%032x', n), 'say', '{\"args\":[\"x\"]}', 1, nullif(n % 11, 10) FROM number",
            (count,),
        )


def test_a_stopped_process_keeps_its_tasks(tmp_path: Path, ledger: Ledger) -> None:
    """SIGSTOP is not death: nobody takes its task, however long; there is no visibility timeout to outlast."""
    url = f"sqlite:///{tmp_path / 'leveret.db'}"
    client = Client(url)
    client.enqueue(ledger_app.pause, "a", 3)
    with Worker(url, ledger, "--concurrency", "1") as stopped:
        ledger.wait_for("start a")
        stopped.signal(signal.SIGSTOP)
        with Worker(url, ledger).ready():
            client.enqueue(ledger_app.pause, "b", 3)
            ledger.wait_for("end b")
        assert ledger.count("start a") == 1
        os.kill(stopped.pid, signal.SIGCONT)
        ledger.wait_for("end a")
        client.wait_until_empty("work")
    assert ledger.count("start a") == 1
