"""Opening the file: whose it is, its schema, and what makes an older one a newer one."""

from __future__ import annotations

import logging
import os
import sqlite3
from importlib import resources
from typing import TYPE_CHECKING

from leveret.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("leveret.sqlite")

#: "Lvrt", so that `file` and other programs can tell whose database it is.
APPLICATION_ID = 0x4C767274
SCHEMA_VERSION = 3
#: What makes a file of each version one of the next.
_UPGRADES = {
    1: (
        "ALTER TABLE queue ADD COLUMN paused INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE task ADD COLUMN priority INTEGER",
        "ALTER TABLE task ADD COLUMN worker TEXT",
        "DROP INDEX task_ready",
        "CREATE INDEX task_ready ON task (queue, coalesce(priority, 4) DESC, seq) WHERE state = 'ready'",
        "CREATE UNIQUE INDEX task_id ON task (id)",
    ),
    2: (
        "CREATE TABLE record (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, change INTEGER NOT NULL,"
        " at REAL NOT NULL, status BLOB NOT NULL)",
        "CREATE INDEX record_at ON record (at)",
        "CREATE TABLE watch (task TEXT NOT NULL, consumer INTEGER NOT NULL,"
        " PRIMARY KEY (task, consumer)) WITHOUT ROWID",
        "CREATE INDEX watch_consumer ON watch (consumer)",
        "CREATE TABLE mark (consumer INTEGER NOT NULL, task TEXT NOT NULL, at REAL NOT NULL,"
        " PRIMARY KEY (consumer, task)) WITHOUT ROWID",
        "ALTER TABLE consumer ADD COLUMN describes INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX record_change ON record (change)",
        "CREATE TABLE question (asker INTEGER NOT NULL, consumer INTEGER NOT NULL, answer BLOB,"
        " PRIMARY KEY (asker, consumer)) WITHOUT ROWID",
        "CREATE INDEX question_consumer ON question (consumer)",
    ),
}


def open_database(path: Path, *, timeout: float) -> sqlite3.Connection:
    """Open the file, or make it, readable by its owner only. ``timeout``: seconds to wait for another writer."""
    if not path.exists():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        log.info("made the file %s", path)
    database = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=True)
    try:
        _prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    _check_owner(database, path)
    database.execute("PRAGMA journal_mode = WAL")
    # FULL syncs the log at each commit: without it, a commit survives a crash of the process but not of the machine.
    database.execute("PRAGMA synchronous = FULL")
    # The schema's CHECK is there for other programs' hands; of ours it would cost a quarter of an insert.
    database.execute("PRAGMA ignore_check_constraints = ON")
    database.execute("BEGIN IMMEDIATE")
    version = _check_owner(database, path)
    if version == 0:
        for statement in resources.files(__package__).joinpath("schema.sql").read_text().split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    else:
        for older in range(version, SCHEMA_VERSION):
            for statement in _UPGRADES[older]:
                database.execute(statement)
    if version < SCHEMA_VERSION:
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    database.execute("COMMIT")
    # From here on whoever begins a transaction waits for the lock (`writer`).
    database.execute("PRAGMA busy_timeout = 0")


def _check_owner(database: sqlite3.Connection, path: Path) -> int:
    """The schema's version, 0 for an empty file. Raises StoreError before anything is written to a foreign file."""
    (owner,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and owner != APPLICATION_ID:
        raise StoreError(f"{path} is another program's SQLite file; name a file of Leveret's own in the URL")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} was written by a newer Leveret (schema {version}); upgrade this one")
    return int(version)
