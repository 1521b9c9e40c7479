"""Tasks that are stored in the transaction of another connection to the same file: the user's own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.sqlite.opening import APPLICATION_ID, SCHEMA_VERSION
from leveret.brokers.sqlite.store import Store
from leveret.errors import StoreError
from leveret.model import KEEP, enqueued

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from leveret.brokers.base import OnConflict
    from leveret.model import Envelope, Queue

#: Nobody can be woken at the user's commit. What is due so soon is found by each worker's next look at the file
#: (seconds), as what is delayed is.
_SOON = 0.01


def insert_within(
    database: sqlite3.Connection,
    tasks: Sequence[tuple[Envelope, OnConflict, bool]],
    queues: Mapping[str, Queue],
    path: Path,
    keep: float = KEEP,
) -> None:
    """Store tasks, each with its policy and whether to tell of it, in the transaction that the connection has open.

    Without one, one is begun as sqlite3 does it for an INSERT, and in autocommit mode they are stored by themselves.
    Raises what `Store.insert` does, and StoreError for a file that Leveret has not made.
    """
    before: tuple[Any, Any] = database.row_factory, database.text_factory
    database.row_factory, database.text_factory = None, str
    try:
        _check(database, path)
        if not database.in_transaction and database.isolation_level is not None:
            database.execute("BEGIN IMMEDIATE")
        database.execute("SAVEPOINT leveret_enqueue")
        try:
            _insert(Store(database, keep=keep, declared=dict(queues)), tasks)
        except BaseException:
            database.execute("ROLLBACK TO leveret_enqueue")
            raise
        finally:
            database.execute("RELEASE leveret_enqueue")
    finally:
        database.row_factory, database.text_factory = before


def _insert(store: Store, tasks: Sequence[tuple[Envelope, OnConflict, bool]]) -> None:
    now = time.time()
    for envelope, on_conflict, notify in tasks:
        soon = envelope if envelope.due is not None else msgspec.structs.replace(envelope, due=now + _SOON)
        existing = store.insert([soon], on_conflict)
        if notify and not existing and store.watches.is_watched():
            store.records.note([enqueued(envelope, now)])


def _check(database: sqlite3.Connection, path: Path) -> None:
    (owner,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if owner != APPLICATION_ID or version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} has not the tables of this Leveret: have it make them before your own, with 'async with app:' or "
            "'leveret queues', or name another file in the broker's URL"
        )
