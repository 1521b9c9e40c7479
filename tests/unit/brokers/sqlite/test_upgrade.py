"""A file of an older Leveret's goes on being used."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from importlib import resources
from typing import TYPE_CHECKING

from leveret.brokers import sqlite
from leveret.brokers.sqlite import SQLiteBroker
from leveret.brokers.sqlite.opening import APPLICATION_ID, SCHEMA_VERSION
from leveret.model import LIMITS, Envelope, Queue, limit_header, new_id

if TYPE_CHECKING:
    from pathlib import Path

WORK = Queue("work")


#: What the fourth version's tables lacked.
BACK_TO_4 = """
DROP TABLE limit_row;
DROP TABLE limit_use;
DROP TABLE lane;
DROP INDEX task_limited;
DROP INDEX task_lane;
ALTER TABLE task DROP COLUMN lane;
PRAGMA user_version = 4;
"""
#: What the first version's tables lacked, or had otherwise.
BACK_TO_1 = f"""{BACK_TO_4}
DROP TABLE record;
DROP TABLE watch;
DROP TABLE mark;
DROP TABLE question;
DROP TABLE schedule;
ALTER TABLE consumer DROP COLUMN describes;
ALTER TABLE queue DROP COLUMN paused;
DROP INDEX task_ready;
DROP INDEX task_id;
DROP TABLE unique_hold;
DROP INDEX task_unique;
ALTER TABLE task DROP COLUMN unique_key;
ALTER TABLE task DROP COLUMN priority;
ALTER TABLE task DROP COLUMN worker;
CREATE INDEX task_ready ON task (queue, seq) WHERE state = 'ready';
PRAGMA user_version = 1;
"""


def schema(path: Path) -> set[tuple[str, str]]:
    """Every table's columns, and every index's definition."""
    with closing(sqlite3.connect(path)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        columns = {(table, column[1]) for table in tables for column in database.execute(f"PRAGMA table_info({table})")}
        return columns | set(
            database.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND sql NOT NULL")
        )


async def test_the_states_of_a_file_of_version_4(tmp_path: Path) -> None:
    """Tasks wait for limits in it, as in a new one: an integrity check finds no state that must not be."""
    path = tmp_path / "old.db"
    sql = resources.files(sqlite).joinpath("schema.sql").read_text()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(sql.replace("'delayed', 'limited', 'running'", "'delayed', 'running'"))
        database.executescript(f"PRAGMA application_id = {APPLICATION_ID}; {BACK_TO_4}")
    broker = SQLiteBroker(path, timeout=5)
    await broker.declare([WORK])
    headers = {LIMITS: limit_header([("one", "")])}
    await broker.publish([Envelope(new_id(), WORK.name, "say", b"{}", headers=headers)])
    (stats,) = await broker.queues.stats()
    await broker.close()
    assert (stats.ready, stats.limited) == (0, 1)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert "'limited'" in database.execute("SELECT sql FROM sqlite_schema WHERE name = 'task'").fetchone()[0]


async def test_a_file_of_version_1(tmp_path: Path) -> None:
    """It keeps its tasks, becomes like a new one, and can be paused."""
    path = tmp_path / "old.db"
    broker = SQLiteBroker(path, timeout=5)
    await broker.declare([WORK])
    await broker.publish([Envelope(new_id(), WORK.name, "say", b"{}")])
    await broker.close()
    new = schema(path)
    with closing(sqlite3.connect(path)) as database:
        database.executescript(BACK_TO_1)
    assert schema(path) != new
    broker = SQLiteBroker(path, timeout=5)
    await broker.queues.pause(WORK.name)
    (stats,) = await broker.queues.stats()
    await broker.close()
    assert (stats.ready, stats.paused) == (1, True)
    assert schema(path) == new
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
