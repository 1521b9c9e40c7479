"""Which consumers there are: each has a number, a wake-up, and its credit for each of its queues."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.rows import MOST_NUMBER
from leveret.brokers.sqlite.sql import Statements
from leveret.model import Queue, back

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers.sqlite.cancellations import Cancellations
    from leveret.brokers.sqlite.dealing import Dealing
    from leveret.brokers.sqlite.questions import Questions
    from leveret.brokers.sqlite.queues import Queues
    from leveret.brokers.sqlite.recipients import Receiver, Recipients
    from leveret.brokers.sqlite.statuses import Records, Watches

#: More consumers than a file ever had.
_FAR = 2**32


class Registrations(Statements):
    """Registers consumers, watchers and askers, and removes those that are gone.

    A consumer's number means nothing in another store: others have it there.
    """

    def __init__(
        self,
        dealing: Dealing,
        queues: Queues,
        recipients: Recipients,
        records: Records,
        watches: Watches,
        cancellations: Cancellations,
        questions: Questions,
    ) -> None:
        super().__init__(dealing.database)
        self._dealing = dealing
        self._queues = queues
        self._recipients = recipients
        self._records = records
        self._watches = watches
        self._cancellations = cancellations
        self._questions = questions
        #: Those that this store has registered, and those that it has in this transaction.
        self._own: set[int] = set()
        self._registering: set[int] = set()

    def register(
        self, wake_up: str, queues: Sequence[Queue], credit: int | None, receiver: Receiver, *, describes: bool = False
    ) -> int:
        """A new consumer of the queues, in this process; its number. ``describes``: it tells what it does if asked."""
        self._queues.declare(queues)
        self._number_anew()
        inserted = self.execute("INSERT INTO consumer (bell, describes) VALUES (?, ?)", wake_up, describes)
        consumer = int(inserted.lastrowid or 0)
        self._recipients.join(consumer, receiver)
        self._registering.add(consumer)
        ids = [self._queues.id_of(name) for name in dict.fromkeys(queue.name for queue in queues)]
        for queue in ids:
            self.execute("INSERT INTO taker VALUES (?, ?, ?, ?)", queue, consumer, credit, self._dealing.ticks(1)[0])
        self._dealing.deal(ids)
        return consumer

    def register_watcher(self, wake_up: str) -> tuple[int, int]:
        """A consumer that takes nothing, and wants to know: its number, and that of the last change."""
        self._number_anew()
        number = int(self.execute("INSERT INTO consumer (bell) VALUES (?)", wake_up).lastrowid or 0)
        self._registering.add(number)
        (last,) = self.execute("SELECT tick FROM clock").fetchone()
        return number, int(last)

    def has(self, consumer: int) -> bool:
        """Whether this store has registered it, and not another that was here before."""
        return consumer in self._own

    def set_credit(self, consumer: int, credit: int) -> None:
        """Change its credit for each queue; as long as it holds more, it is dealt nothing."""
        if consumer not in self._own:
            return
        queues = self.execute(
            "UPDATE taker SET free = ? - (SELECT count(*) FROM task WHERE state = 'running'"
            " AND task.consumer = taker.consumer AND task.queue = taker.queue) WHERE consumer = ? RETURNING queue",
            credit,
            consumer,
        )
        self._dealing.deal(queue for (queue,) in queues.fetchall())

    def stop_taking(self, consumer: int) -> None:
        """Deal it nothing more; what it has stays its own."""
        if consumer in self._own:
            self.execute("DELETE FROM taker WHERE consumer = ?", consumer)

    def look(self, consumer: int) -> None:
        """Deal what has become due, and have the consumer told what it has and how things are."""
        self._dealing.woken.add(consumer)

    def look_around(self, consumer: int) -> list[tuple[int, object]]:
        """The same; every registered consumer and its wake-up."""
        self.look(consumer)
        self._dealing.free_stuck()
        return self.all()

    def all(self) -> list[tuple[int, object]]:
        """Every registered consumer and its wake-up."""
        return self.execute("SELECT id, bell FROM consumer").fetchall()

    def leave(self, consumer: int) -> None:
        """One of this process ends."""
        self._recipients.forget(consumer)
        if consumer in self._own:
            self._own.discard(consumer)
            self.remove([consumer])

    def take_back(self, wake_up: str) -> None:
        """A registration of this process that nobody waits for any more: if it was made, it ends."""
        for (consumer,) in self.execute("SELECT id FROM consumer WHERE bell = ?", wake_up).fetchall():
            self.leave(consumer)

    def remove_dead(self, dead: Iterable[tuple[int, object]]) -> None:
        """Those of the consumers, given with their wake-ups, that are in this file: it may be another one by now."""
        self.remove(number for number, wake_up in dead if self.is_registered(number, wake_up))

    def remove_lost(self) -> None:
        """Give back what belongs to consumers that are not registered: the file was mended, or meddled with."""
        lost = self.execute(
            "SELECT DISTINCT consumer FROM task WHERE state = 'running'"
            " AND NOT EXISTS (SELECT 1 FROM consumer WHERE consumer.id = task.consumer)"
        ).fetchall()
        self.execute("DELETE FROM taker WHERE NOT EXISTS (SELECT 1 FROM consumer WHERE consumer.id = taker.consumer)")
        self.remove(number for (number,) in lost)

    def remove(self, consumers: Iterable[int]) -> None:
        """Consumers that are gone: what they had goes back to where it stood, for the others."""
        queues: set[int] = set()
        for consumer in consumers:
            self._cancellations.end_all(consumer)
            self._watches.remove_all(consumer)
            self._questions.gone(consumer)
            returned = self.execute(
                "UPDATE task SET state = 'ready', consumer = NULL, token = NULL, returns = returns + 1"
                " WHERE state = 'running' AND consumer IS ? RETURNING queue, id",
                consumer,
            ).fetchall()
            queues.update(queue for queue, _ in returned)
            self._records.amend([id_ for _, id_ in returned], partial(back, now=time.time()))
            self.execute("DELETE FROM taker WHERE consumer = ?", consumer)
            self.execute("DELETE FROM consumer WHERE id = ?", consumer)
        self._dealing.deal(queues)

    def is_registered(self, consumer: int, wake_up: object) -> bool:
        row = self.execute("SELECT 1 FROM consumer WHERE id = ? AND bell = ?", consumer, wake_up).fetchone()
        return row is not None

    def _number_anew(self) -> None:
        """No number follows the last one, which SQLite keeps: it would say that the disk is full."""
        if self.execute("SELECT 1 FROM sqlite_sequence WHERE name = 'consumer' AND seq >= ?", MOST_NUMBER).fetchone():
            # Far above all that there were: a number is never given again.
            self.remove([id_ for (id_,) in self.execute("SELECT id FROM consumer WHERE id >= ?", MOST_NUMBER)])
            (last,) = self.execute("SELECT coalesce(max(id), 0) FROM consumer").fetchone()
            self.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'consumer'", last + _FAR)

    def end(self, *, committed: bool) -> None:
        """The transaction has ended."""
        if committed:
            self._own |= self._registering
        self._registering.clear()
