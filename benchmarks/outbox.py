"""What the outbox costs: ``python -m benchmarks.outbox``, on a PostgreSQL and a RabbitMQ 4 node of its own."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncpg
import psycopg

from leveret import App, Queue
from leveret.outbox import StoredTask, create_outbox
from tests.support.databases import PostgreSQL
from tests.support.nodes import Node

app = App(queues=[Queue("work")])
_TICKS = os.sysconf("SC_CLK_TCK")
#: Transactions that are timed, rows that are relayed, rows that lie there while memory is looked at, and starts.
_TRANSACTIONS, _ROWS, _MANY, _STARTS = 3_000, 30_000, 100_000, 200


@app.task(queue="work", store_result=False)
def note(sent: float) -> None:
    """Tell how long ago its transaction was about to commit."""
    with Path(os.environ["STARTS"]).open("a") as file:
        file.write(f"{time.time() - sent}\n")


async def _transactions(url: str, *, with_task: bool) -> float:
    """Transactions a second of one connection."""
    connection = await asyncpg.connect(url)
    began = time.perf_counter()
    for number in range(_TRANSACTIONS):
        async with connection.transaction():
            await connection.execute("INSERT INTO orders (number) VALUES ($1)", number)
            if with_task:
                await note.enqueue_in(connection, 0.0)
    taken = time.perf_counter() - began
    await connection.execute("TRUNCATE orders, leveret_outbox")
    await connection.close()
    return _TRANSACTIONS / taken


def _fill(url: str, count: int) -> None:
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        copied = "COPY leveret_outbox (id, task, queue, message, created) FROM STDIN (FORMAT BINARY)"
        with cursor.copy(copied) as copy:
            copy.set_types(["varchar", "text", "varchar", "bytea", "float8"])
            for number in range(count):
                stored = note._stored_task((float(number),), {})
                copy.write_row(StoredTask(stored.envelope, notify=False).row())


def _left(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT count(*) FROM (SELECT 1 FROM leveret_outbox LIMIT 1) AS one").fetchone()
    connection.rollback()
    return int(row[0]) if row else 0


def _relay(database: str, broker: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "leveret", "relay", "benchmarks/outbox.py:app", "--database", database]
    return subprocess.Popen([*command, "--url", broker], stderr=subprocess.DEVNULL)


def _worker(database: str, broker: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "leveret", "worker", "benchmarks/outbox.py:app", "--url", broker]
    return subprocess.Popen([*command, "--relay", database], stderr=subprocess.DEVNULL)


def _processor(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _relayed(database: str, broker: str, count: int) -> dict[str, float]:
    """From a relay that is up and idle: the rows come in one commit."""
    relay = _relay(database, broker)
    try:
        time.sleep(4)
        _fill(database, 500)  # connections and queues
        time.sleep(3)
        first, processor, most = _resident(relay.pid), _processor(relay.pid), 0.0
        with psycopg.connect(database) as connection:
            began = time.perf_counter()
            _fill(database, count)
            filled = time.perf_counter() - began
            while _left(connection):
                most = max(most, _resident(relay.pid))
                time.sleep(0.02)
            taken = time.perf_counter() - began - filled
        spent = _processor(relay.pid) - processor
        return {"rows/s": count / taken, "us/row": spent / count * 1e6, "MiB before": first, "MiB most": most}
    finally:
        relay.terminate()
        relay.wait()


async def _starts(database: str, broker: str, folder: Path) -> dict[str, float]:
    """How long after its transaction's commit a task starts (ms)."""
    os.environ["STARTS"] = str(folder / "starts")
    worker = _worker(database, broker)
    try:
        connection = await asyncpg.connect(database)
        await asyncio.sleep(8)
        for _ in range(_STARTS):
            async with connection.transaction():
                await note.enqueue_in(connection, time.time())
            await asyncio.sleep(0.02)
        await connection.close()
        await asyncio.sleep(2)
    finally:
        worker.terminate()
        worker.wait()
    times = sorted(float(line) * 1_000 for line in (folder / "starts").read_text().splitlines())
    return {"n": len(times), "median": statistics.median(times), "p95": times[int(len(times) * 0.95)]}


def main() -> None:
    """Measure, and print JSON."""
    server, node = PostgreSQL(fsync=True), Node("4")
    try:
        node.start()
        node.wait()
        shop = server.new_database()
        with psycopg.connect(shop, autocommit=True) as connection:
            for statement in create_outbox("postgresql"):
                connection.execute(statement.encode())
            connection.execute("CREATE TABLE orders (number BIGINT)")
        figures: dict[str, Any] = {"alone/s": [], "with task/s": []}
        for _ in range(3):
            figures["alone/s"].append(asyncio.run(_transactions(shop, with_task=False)))
            figures["with task/s"].append(asyncio.run(_transactions(shop, with_task=True)))
        figures["relay"] = _relayed(shop, node.url, _ROWS)
        figures["relay, many"] = _relayed(shop, node.url, _MANY)
        node.ctl("delete_queue", "work")
        with tempfile.TemporaryDirectory() as folder:
            figures["commit to start, ms"] = asyncio.run(_starts(shop, node.url, Path(folder)))
        print(json.dumps(figures, indent=2))
    finally:
        node.close()
        server.close()


if __name__ == "__main__":
    main()
