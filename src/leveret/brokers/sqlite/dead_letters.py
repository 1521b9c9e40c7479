"""The dead letters of a queue: read, put back, dropped."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.sqlite.dealing import AGAIN
from leveret.brokers.sqlite.rows import ENVELOPE, envelope_of, key_in, text
from leveret.brokers.sqlite.sql import Statements
from leveret.model import DeadLetter, new_id, revived_again, unix_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.base import Select
    from leveret.brokers.sqlite.dealing import Dealing
    from leveret.brokers.sqlite.queues import Queues
    from leveret.brokers.sqlite.statuses import Records


class DeadLetters(Statements):
    """Tasks that will not run, with the reasons."""

    def __init__(self, dealing: Dealing, queues: Queues, records: Records) -> None:
        super().__init__(dealing.database)
        self._dealing = dealing
        self._queues = queues
        self._records = records

    def found(self, queue: str, limit: int, select: Select | None = None) -> list[DeadLetter]:
        rows = self.execute(
            # An id that is no UTF-8 is read with escapes, and no other look would find it.
            f"SELECT seq, CAST(task.id AS BLOB), reason, traceback, died_at, worker, {ENVELOPE} FROM task"  # noqa: S608
            " JOIN queue ON queue.id = task.queue WHERE state = 'dead' AND queue.name = ? ORDER BY seq LIMIT ?",
            queue,
            limit,
        )
        letters: list[DeadLetter] = []
        renamed: list[tuple[str, int]] = []
        # One after the other: all of them may be too large to be there together.
        for seq, id_, *columns in rows:
            letter = _dead_letter(*columns)
            if letter.envelope.id.encode(errors="replace") != id_:
                renamed.append((letter.envelope.id, seq))
            chosen = letter if select is None else select(letter)
            if chosen is not None:
                letters.append(chosen)
        self.database.executemany("UPDATE OR IGNORE task SET id = ? WHERE seq = ?", renamed)
        return letters

    def retry(self, queue: str, ids: Sequence[str]) -> list[str]:
        number, now = self._queues.id_of(queue), time.time()
        self._dealing.number_anew()
        found = [id_ for id_ in ids if self._revive(number, id_, now)]
        self._records.amend(found, partial(revived_again, now=now))
        self._dealing.deal([number])
        return found

    def drop(self, queue: str, ids: Sequence[str]) -> list[str]:
        number = self._queues.id_of(queue)
        return [id_ for id_ in ids if self.execute(_DROP, number, id_).fetchall()]

    def _revive(self, queue: int, id_: str, now: float) -> bool:
        """False: it is not there, or another task has its unique key."""
        row = self.execute(
            "SELECT headers FROM task WHERE queue = ? AND state = 'dead' AND id = ?", queue, id_
        ).fetchone()
        key = None if row is None else key_in(row[0])
        if key is not None and self.execute("SELECT 1 FROM task WHERE unique_key = ?", key).fetchone():
            return False
        revived = self.execute(_REVIVE, now, key, queue, id_).fetchall()
        self._dealing.limits.wait((lane, priority) for _, lane, priority in revived if lane is not None)
        return bool(revived)


_ONE = "WHERE queue = ? AND state = 'dead' AND id = ? RETURNING id, lane, priority"
_DROP = f"DELETE FROM task {_ONE}"  # noqa: S608 - constants
_REVIVE = (
    f"UPDATE task SET seq = (SELECT max(seq) + 1 FROM task), state = {AGAIN}, attempt = 1, returns = 0,"  # noqa: S608
    " enqueued_at = ?, unique_key = ?, due = NULL, expires_at = NULL, reason = NULL, traceback = NULL,"
    f" died_at = NULL, worker = NULL {_ONE}"
)


def _dead_letter(reason: object, traceback: object, died_at: object, worker: object, *columns: object) -> DeadLetter:
    envelope = envelope_of(columns)
    if type(columns[0]) is not str:
        envelope = msgspec.structs.replace(envelope, id=new_id())
    return DeadLetter(
        envelope,
        *("" if reason is None else text(reason), "" if traceback is None else text(traceback)),
        *(unix_time(died_at), None if worker is None else text(worker)),
    )
