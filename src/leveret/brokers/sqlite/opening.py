"""Opening the file: whose it is, its schema, and what makes an older one a newer one."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing, suppress
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.identity import FileAway, Identity, check_place
from leveret.brokers.sqlite.rows import MOST_NUMBER
from leveret.brokers.sqlite.sharing import share_logs
from leveret.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("leveret.sqlite")

#: "Lvrt", so that `file` and other programs can tell whose database it is.
APPLICATION_ID = 0x4C767274
SCHEMA_VERSION = 5
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
    3: (
        "CREATE TABLE schedule (name TEXT PRIMARY KEY, due REAL, declared REAL, row BLOB NOT NULL) WITHOUT ROWID",
        "CREATE INDEX schedule_due ON schedule (due) WHERE due IS NOT NULL",
        "ALTER TABLE task ADD COLUMN unique_key TEXT",
        "CREATE UNIQUE INDEX task_unique ON task (unique_key) WHERE unique_key IS NOT NULL",
        "CREATE TABLE unique_hold (key TEXT PRIMARY KEY, id TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
        "CREATE INDEX unique_hold_until ON unique_hold (until)",
    ),
    4: (
        "ALTER TABLE task ADD COLUMN lane INTEGER",
        # The CHECK of its states, which no other statement can change; the rows stay as they are.
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = replace(sql, '''running'',', '''limited'', ''running'',')"
        " WHERE type = 'table' AND name = 'task'",
        "PRAGMA writable_schema = RESET",
        "CREATE INDEX task_limited ON task (lane, coalesce(priority, 4) DESC, seq) WHERE state = 'limited'",
        "CREATE INDEX task_lane ON task (lane) WHERE lane IS NOT NULL",
        "CREATE TABLE limit_row (name TEXT PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE limit_use (id INTEGER PRIMARY KEY, name TEXT NOT NULL, key TEXT NOT NULL,"
        " admitted INTEGER NOT NULL DEFAULT 0, full_at REAL NOT NULL DEFAULT 0, wake_at REAL)",
        "CREATE UNIQUE INDEX limit_use_key ON limit_use (name, key)",
        "CREATE INDEX limit_use_wake ON limit_use (wake_at) WHERE wake_at IS NOT NULL",
        "CREATE TABLE lane (id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, key TEXT NOT NULL, uses TEXT NOT NULL,"
        " fair TEXT, rank INTEGER, turn INTEGER NOT NULL, held_by INTEGER)",
        "CREATE UNIQUE INDEX lane_key ON lane (queue, key)",
        "CREATE INDEX lane_fair ON lane (queue, fair) WHERE fair IS NOT NULL",
        "CREATE INDEX lane_open ON lane (queue, rank, turn, id) WHERE rank IS NOT NULL AND held_by IS NULL",
        "CREATE INDEX lane_held ON lane (held_by, queue, rank, turn, id) WHERE held_by IS NOT NULL",
    ),
}


def open_database(path: Path, *, timeout: float, again: bool = False) -> tuple[sqlite3.Connection, Identity]:
    """Open the file, or make it, readable by its owner only. ``timeout``: seconds to wait for another writer.

    ``again``: this program had it open before. Then a missing or empty file is left alone, as it may be about to be
    restored, and raises FileAway.
    """
    database = path.resolve()
    check_place(path, database)
    if again:
        check_there(path)
    else:
        with suppress(FileExistsError):
            os.close(os.open(database, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            log.info("made the file %s", path)
    before = database.stat()
    connection = sqlite3.connect(database, timeout=timeout, isolation_level=None, check_same_thread=False)
    try:
        _prepare(connection, path)
        share_logs(database)
        identity = Identity(path, database)
    except BaseException:
        connection.close()
        raise
    if not os.path.samestat(before, path.stat()):
        close_as_it_is(connection)
        raise FileAway(f"{path} was replaced while it was opened; try again")
    return connection, identity


def close_as_it_is(connection: sqlite3.Connection) -> None:
    """Close it without writing its log into the file, which may be another's by now, or damaged."""
    with suppress(sqlite3.Error):
        connection.interrupt()  # SQLite's own copying at a close heeds it
        connection.close()


def check_there(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise FileAway(
            f"{path} was removed or moved away while this program used it ({error.strerror}): nothing is stored or "
            "taken until it is back. To begin with a new file, start this program again"
        ) from error
    if not size:
        raise FileAway(
            f"{path} was emptied, or is being restored: nothing is stored or taken until it is whole. To begin with a "
            "new file, start this program again"
        )


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    # In one transaction: another program may be making the tables in this moment.
    database.execute("BEGIN")
    version = _check_owner(database, path)
    if version == SCHEMA_VERSION:
        check_schema(database, path)
    database.execute("COMMIT")
    (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(
            f"the file system of {path} cannot have SQLite's write-ahead log (its journal stays {mode!r}): "
            "put the file on a local disk"
        )
    # FULL syncs the log at each commit: without it, a commit survives a crash of the process but not of the machine.
    database.execute("PRAGMA synchronous = FULL")
    # The schema's CHECK is there for other programs' hands; of ours it would cost a quarter of an insert.
    database.execute("PRAGMA ignore_check_constraints = ON")
    # What the file's schema calls must not be functions that do something outside it.
    database.execute("PRAGMA trusted_schema = OFF")
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
        check_schema(database, path)
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
    if version < 0 or bool(version) != bool(tables):
        raise _changed(
            path, f"its schema's version (PRAGMA user_version) is {version}, with {tables} tables and indexes"
        )
    return int(version)


def check_schema(database: sqlite3.Connection, path: Path) -> None:
    """Whether Leveret's tables are as it made them. Raises StoreError: another program has changed them."""
    rows = database.execute("SELECT type, name, tbl_name FROM sqlite_schema").fetchall()
    kinds = {name: kind for kind, name, _ in rows}
    for table, columns in _schema().items():
        kind = kinds.get(table)
        if kind != "table":
            raise _changed(
                path, f"it has no table {table!r}" if kind is None else f"{table!r} is a {kind}, not a table"
            )
        found = {row[1] for row in database.execute("SELECT * FROM pragma_table_info(?)", (table,))}
        if missing := sorted(columns - found):
            raise _changed(path, f"the table {table!r} has no column {missing[0]!r}")
    for index in _indexes():
        if kinds.get(index) != "index":
            raise _changed(path, f"it has no index {index!r}")
    for kind, name, table in rows:
        if kind == "trigger" and table in _schema():
            raise _changed(path, f"the table {table!r} has a trigger, {name!r}")
    ticks = database.execute("SELECT tick FROM clock LIMIT 2").fetchall()
    if len(ticks) != 1 or not isinstance(ticks[0][0], int) or not 0 <= ticks[0][0] < MOST_NUMBER:
        raise _changed(path, f"the table 'clock' must have one row with a number, and has {ticks!r}")


@cache
def _schema() -> dict[str, frozenset[str]]:
    """The columns of each table."""
    return {table: frozenset(columns) for table, columns in _made()[0].items()}


@cache
def _indexes() -> frozenset[str]:
    return frozenset(_made()[1])


def _made() -> tuple[dict[str, list[str]], list[str]]:
    with closing(sqlite3.connect(":memory:")) as made:
        made.executescript(resources.files(__package__).joinpath("schema.sql").read_text())
        names = made.execute("SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite%'").fetchall()
        tables = {
            name: [row[1] for row in made.execute("SELECT * FROM pragma_table_info(?)", (name,))]
            for kind, name in names
            if kind == "table"
        }
    return tables, [name for kind, name in names if kind == "index"]


def _changed(path: Path, how: str) -> StoreError:
    return StoreError(
        f"{path} was changed by another program, and Leveret cannot use it: {how}; restore a backup, or name another "
        "file"
    )
