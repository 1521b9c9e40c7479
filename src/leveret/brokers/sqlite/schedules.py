"""The SQL of schedules: one row each, changed in the transaction that stores what falls due."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.base import no_schedule
from leveret.brokers.sqlite.sql import Statements, array
from leveret.model import DECLARED_FOR, Change, Declare, Put, ScheduleRow, advance, asked, decoded, told_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence

    from leveret.brokers.sqlite.statuses import Records
    from leveret.model import Envelope, ScheduleRequest

_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(ScheduleRow).decode
_DUE = "SELECT row FROM schedule WHERE due <= ? AND (declared IS NULL OR declared >= ?) ORDER BY due"
_NEXT = "SELECT min(due) FROM schedule WHERE due > ?"


class Schedules(Statements):
    """The operations on schedules. ``insert``: stores tasks, all or none."""

    def __init__(
        self, database: sqlite3.Connection, insert: Callable[[Sequence[Envelope]], object], records: Records
    ) -> None:
        super().__init__(database)
        self._insert = insert
        self._records = records

    def all(self) -> Sequence[ScheduleRow]:
        return self._rows("SELECT row FROM schedule ORDER BY name")

    def ask(self, request: ScheduleRequest) -> Change:
        """Raises ScheduleNotFound, or as `insert` does; then it has written nothing."""
        match request:
            case Declare():
                rows = self._rows(_CONCERNED, array([schedule.name for schedule in request.schedules]))
            case Put():
                rows = self._named(request.schedule.name)
            case _:
                rows = self._named(request.name)
        change = asked(request, {row.name: row for row in rows}, time.time())
        if change is None:
            raise no_schedule(request)
        return self._make(change)

    def due(self) -> tuple[Sequence[ScheduleRow], float | None]:
        """Those that are due, and in how many seconds the next one is."""
        now = time.time()
        rows = self._rows(_DUE, now, now - DECLARED_FOR)
        (following,) = self.execute(_NEXT, now).fetchone()
        return rows, None if following is None else following - now

    def advance(self, name: str, unfinished: Mapping[str, bool]) -> Change:
        """Store what is due of one. Raises as `insert` does; then it has written nothing."""
        rows = self._named(name)
        return self._make(advance(rows[0], time.time(), unfinished)) if rows else Change()

    def _make(self, change: Change) -> Change:
        # A task that is there has been stored for this instant, or somebody has taken its id.
        tasks = [task for task in change.tasks if not self._is_there(task.id)]
        if tasks:
            self._insert(tasks)
            self._notify(tasks)
        for name, row in change.rows.items():
            if row is None:
                self.execute("DELETE FROM schedule WHERE name = ?", name)
            else:
                self._write(row)
        return change

    def _notify(self, tasks: Sequence[Envelope]) -> None:
        """Tell those who watch every task; of others the tasks' own rows are enough."""
        if self._records.watches.is_watched():
            self._records.note(told_of(tasks, time.time()))

    def _write(self, row: ScheduleRow) -> None:
        declared = None if row.schedule.origin is None else row.declared
        self.execute(
            "INSERT INTO schedule (name, due, declared, row) VALUES (?, ?, ?, ?) ON CONFLICT (name)"
            " DO UPDATE SET due = excluded.due, declared = excluded.declared, row = excluded.row",
            *(row.name, row.due, declared, _pack(row)),
        )

    def _is_there(self, id_: str) -> bool:
        return self.execute("SELECT 1 FROM task WHERE id = ?", id_).fetchone() is not None

    def _named(self, name: str) -> Sequence[ScheduleRow]:
        return self._rows("SELECT row FROM schedule WHERE name = ?", name)

    def _rows(self, sql: str, *values: object) -> Sequence[ScheduleRow]:
        """Those that Leveret wrote; another program may have written others."""
        found = [decoded(_unpack, row) for (row,) in self.execute(sql, *values).fetchall()]
        return [row for row in found if row is not None]


_CONCERNED = "SELECT row FROM schedule WHERE declared IS NOT NULL OR name IN (SELECT value FROM json_each(?))"
