"""The upper bound on SQLite: Leveret's own tables and statements, ready-made rows, and a claim that looks at none.

Inserting: 1,000 rows a transaction, as `enqueue_many` has them. Claiming: 1,000 a transaction, which deletes those that
were claimed before. The write-ahead log is synced at each commit, as Leveret's is.
"""

from __future__ import annotations

import secrets
import signal
import sqlite3
import sys
import time
from pathlib import Path

from benchmarks.peers.ledger import note_run, own_ledger
from benchmarks.peers.producing import Order, Stopwatch, url

_SCHEMA = Path(__file__).parents[2] / "src" / "leveret" / "brokers" / "sqlite" / "schema.sql"
_BATCH = 1_000
_INSERT = (
    "INSERT INTO task (id, queue, state, name, body, content_type, attempt, enqueued_at)"
    " VALUES (?, 1, 'ready', 'noop', ?, 'application/json', 1, ?)"
)
_CLAIM = (
    "UPDATE task SET state = 'running', consumer = 1, token = seq WHERE seq IN (SELECT seq FROM task"
    " WHERE queue = 1 AND state = 'ready' ORDER BY coalesce(priority, 4) DESC, seq LIMIT ?) RETURNING token"
)
_DELETE = "DELETE FROM task WHERE consumer = 1 AND token BETWEEN ? AND ? AND state = 'running'"


def opened() -> sqlite3.Connection:
    database = sqlite3.connect(url().removeprefix("sqlite:///"), isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA ignore_check_constraints = ON")
    return database


def enqueue(tasks: range) -> None:
    database = opened()
    database.executescript(_SCHEMA.read_text())
    database.execute("INSERT INTO queue (name) VALUES ('work')")
    start = f"{time.time_ns() // 1_000_000:012x}"
    ids = sorted(start + secrets.token_hex(10) for _ in tasks)
    rows = [(id_, b'{"args":[%d],"kwargs":{}}' % task, time.time()) for id_, task in zip(ids, tasks, strict=True)]
    watch = Stopwatch()
    for first in range(0, len(rows), _BATCH):
        database.execute("BEGIN IMMEDIATE")
        database.executemany(_INSERT, rows[first : first + _BATCH])
        database.execute("COMMIT")
    watch.report()


def work(count: int) -> None:
    database, done = opened(), 0
    claimed: list[int] = []
    while done < count or claimed:
        database.execute("BEGIN IMMEDIATE")
        if claimed:
            database.execute(_DELETE, (min(claimed), max(claimed)))
        claimed = [token for (token,) in database.execute(_CLAIM, (_BATCH,))]
        database.execute("COMMIT")
        for task in range(done, done + len(claimed)):
            note_run(task)
        done += len(claimed)


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(len(own_ledger().runs))
        signal.pause()
    else:
        enqueue(Order.read().tasks)
