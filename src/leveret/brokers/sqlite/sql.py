"""What each part of the store has in common: statements on one connection, in a transaction that its caller holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence


class Statements:
    """Runs SQL on the connection that it is given."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self.database.execute(sql, values)


def array(values: Sequence[int] | Sequence[str]) -> str:
    """For `json_each`: as text, since SQLite 3.45.0 takes bytes for its own binary JSON."""
    return msgspec.json.encode(values).decode()
