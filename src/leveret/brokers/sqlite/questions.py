"""Asking the consumers of a file what they do: a row for each that is asked, and wake-ups both ways."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.sql import Statements
from leveret.brokers.sqlite.wakeup import listening
from leveret.model import WorkerReport, report_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    from leveret.brokers.sqlite.wakeup import WakeUps
    from leveret.brokers.sqlite.writer import Writer

#: How long consumers may take to answer (seconds).
_WAIT = 1.0


class Questions(Statements):
    """The SQL. Used by `Store`, in its transactions. ``wake``: told of each consumer that has something to see."""

    def __init__(self, database: sqlite3.Connection, wake: Callable[[int], object]) -> None:
        super().__init__(database)
        self._wake = wake

    def ask(self, asker: int) -> None:
        """Ask all consumers that describe themselves."""
        asked = self.execute(
            "INSERT INTO question (asker, consumer) SELECT ?, id FROM consumer WHERE describes RETURNING consumer",
            asker,
        ).fetchall()
        for (consumer,) in asked:
            self._wake(consumer)

    def unanswered(self, consumer: int) -> frozenset[int]:
        """Who asks the consumer."""
        rows = self.execute("SELECT asker FROM question WHERE consumer = ? AND answer IS NULL", consumer).fetchall()
        return frozenset(asker for (asker,) in rows)

    def answer(self, consumer: int, askers: Sequence[int], answer: bytes) -> None:
        for asker in askers:
            self.execute("UPDATE question SET answer = ? WHERE asker = ? AND consumer = ?", answer, asker, consumer)
            self._wake(asker)

    def answers(self, asker: int) -> list[bytes | None]:
        """One for each that is asked; None: it has not answered yet."""
        rows = self.execute("SELECT answer FROM question WHERE asker = ? ORDER BY consumer", asker).fetchall()
        return [answer for (answer,) in rows]

    def gone(self, consumer: int) -> None:
        """A consumer or an asker has ended."""
        for (asker,) in self.execute("DELETE FROM question WHERE consumer = ? RETURNING asker", consumer).fetchall():
            self._wake(asker)
        self.execute("DELETE FROM question WHERE asker = ?", consumer)


async def ask(writer: Writer, wake_ups: WakeUps) -> Sequence[WorkerReport]:
    """What the living consumers tell within a second."""
    woken = asyncio.Event()
    wake_up = listening(wake_ups, woken.set, writer.path)
    try:
        asker, _ = await writer.do(lambda store: store.registrations.register_watcher(wake_up.name))
        try:
            await writer.do(lambda store: store.questions.ask(asker))
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT):
                    while None in await writer.do(lambda store: store.questions.answers(asker)):
                        await woken.wait()
                        woken.clear()
            answers = await writer.do(lambda store: store.questions.answers(asker))
        finally:
            await asyncio.shield(writer.do(lambda store: store.registrations.leave(asker)))
    finally:
        wake_up.remove()
    reports = [report_of(answer) for answer in answers if answer is not None]
    return [report for report in reports if report is not None]
