"""Whether a queue with a limit has room, without counting a long one at each enqueue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.model import MIDDLE_PRIORITY

if TYPE_CHECKING:
    import sqlite3

#: A limit up to which counting costs next to nothing.
_FEW = 1_000
#: So many priorities are looked at; most queues have one.
_PRIORITIES = 10
_RANK = f"coalesce(priority, {MIDDLE_PRIORITY})"
_COUNT = "SELECT count(*) FROM (SELECT 1 FROM task WHERE queue = ? AND state = 'ready' LIMIT ?)"
_FIRST = (
    f"SELECT {_RANK}, seq FROM task WHERE queue = ? AND state = 'ready' AND {_RANK} < ?"  # noqa: S608 - constants
    f" ORDER BY {_RANK} DESC, seq LIMIT 1"
)
_LAST = f"SELECT max(seq) FROM task WHERE queue = ? AND state = 'ready' AND {_RANK} = ?"  # noqa: S608 - constants


def ready_about(database: sqlite3.Connection, queue: int, limit: int, more: int) -> int:
    """How many are ready, no more than ``limit``; or a larger number, if there is room for ``more`` even so."""
    if limit > _FEW:
        most = _ready_at_most(database, queue)
        if most is not None and most + more <= limit:
            return most
    return int(database.execute(_COUNT, (queue, limit)).fetchone()[0])


def _ready_at_most(database: sqlite3.Connection, queue: int) -> int | None:
    """By the ends of each priority's line: there are other tasks between them, so never fewer. None: too many lines."""
    most, below = 0, float("inf")
    for _ in range(_PRIORITIES):
        first = database.execute(_FIRST, (queue, below)).fetchone()
        if first is None:
            return most
        below, seq = first
        (last,) = database.execute(_LAST, (queue, below)).fetchone()
        most += last - seq + 1
    return None
