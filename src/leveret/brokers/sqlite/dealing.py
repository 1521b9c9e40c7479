"""Who gets what: ready tasks are dealt to the consumers with free credit, once in each transaction."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.limits import Limits
from leveret.brokers.sqlite.rows import MOST_NUMBER
from leveret.brokers.sqlite.sql import Statements, array
from leveret.model import LATEST, MIDDLE_PRIORITY, unix_time

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

#: As the index has it, literally: else SQLite would sort all that is ready.
CLAIM = (
    f"SELECT seq, -coalesce(priority, {MIDDLE_PRIORITY}) FROM task WHERE queue = ? AND state = 'ready'"  # noqa: S608
    f" ORDER BY coalesce(priority, {MIDDLE_PRIORITY}) DESC, seq LIMIT ?"
)
#: The state of a task that may run, but for its limits.
AGAIN = "CASE WHEN lane IS NULL THEN 'ready' ELSE 'limited' END"
_TAKERS = (
    "SELECT consumer, free FROM taker WHERE queue = ? AND (free IS NULL"
    " OR (typeof(free) = 'integer' AND free BETWEEN 1 AND 4294967295))"
    " AND NOT (SELECT paused FROM queue WHERE queue.id = taker.queue) ORDER BY turn"
)
#: Tokens in the order of the array. One statement for all of them: this thread gives the GIL away at each.
_HAND = (
    "UPDATE task SET state = 'running', consumer = ?, token = ? + hand.key FROM json_each(?) AS hand"
    " WHERE seq = hand.value"
)
#: To the ends of their queues, in the order of the array: what was enqueued while they were not due stands before them.
_RIPEN = (
    f"UPDATE task SET state = {AGAIN}, seq = (SELECT max(seq) FROM task) + 1 + due.key FROM json_each(?) AS due"  # noqa: S608
    " WHERE seq = due.value"
)
_STUCK = f"UPDATE task SET state = {AGAIN} WHERE state = 'delayed'"  # noqa: S608 - constants


class Dealing(Statements):
    """Deals, and holds for one transaction which queues have tasks or credit to deal, and whom it concerns."""

    def __init__(self, database: sqlite3.Connection) -> None:
        super().__init__(database)
        self._undealt: set[int] = set()
        self.limits = Limits(database, self.deal, self.ticks)
        #: The consumers that have something to see.
        self.woken: set[int] = set()

    def deal(self, queues: Iterable[int]) -> None:
        """Hand ready tasks to the consumers with free credit, in turn: once, at the end of the transaction."""
        self._undealt.update(queues)

    def deal_all(self) -> bool:
        """Whether there was something to deal."""
        self.limits.begin()
        is_due = bool(self._undealt)
        while self._undealt:
            queue = self._undealt.pop()
            may_admit = self.limits.may_admit(queue)
            takers = self.execute(_TAKERS, queue).fetchall()
            if takers:
                self._deal_in_turn(queue, takers, may_admit=may_admit)
        return is_due

    def _deal_in_turn(self, queue: int, takers: list[tuple[int, int | None]], *, may_admit: bool) -> None:
        limit = -1 if any(free is None for _, free in takers) else sum(free or 0 for _, free in takers)
        rows = self.execute(CLAIM, queue, limit).fetchall()
        ready = [seq for seq, _ in rows]
        if may_admit:
            ready, is_timed = self.limits.admit(queue, rows, limit)
            if is_timed:
                self.woken.add(takers[0][0])  # who then knows when to look
        hands, last = share([free for _, free in takers], len(ready))
        for index in last:
            consumer, _ = takers[index]
            tokens = self.ticks(len(hands[index]))
            hand = [ready[card] for card in hands[index]]
            self.execute(_HAND, consumer, tokens[0], array(hand))
            self.execute(
                "UPDATE taker SET free = free - ?, turn = ? WHERE queue = ? AND consumer = ?",
                len(tokens),
                tokens[-1],
                queue,
                consumer,
            )
            self.woken.add(consumer)

    def promote(self) -> float | None:
        """Make ready what is due, and deal it; when the next task is due (Unix time)."""
        now = time.time()
        next_due = self.next_due()
        if next_due is None or next_due > now:
            return next_due
        self.limits.ring(now)
        due = self.execute(
            "SELECT seq, queue, lane, priority FROM task WHERE state = 'delayed' AND due <= ? ORDER BY due", now
        ).fetchall()
        self.execute(_RIPEN, array([seq for seq, *_ in due]))
        self._wait(due)
        return self.next_due()

    def next_due(self) -> float | None:
        """When a delayed task is due, or a limit has room again (Unix time)."""
        (due,) = self.execute("SELECT min(due) FROM task WHERE state = 'delayed'").fetchone()
        times = (unix_time(due), self.limits.next_time())
        return min((when for when in times if when is not None), default=None)

    def _wait(self, tasks: Iterable[tuple[object, int, int | None, int | None]]) -> None:
        """Tasks are ready, or wait in their lanes, from now on."""
        self.limits.wait((lane, priority) for _, _, lane, priority in tasks if lane is not None)
        self.deal({queue for _, queue, *_ in tasks})

    def free_stuck(self) -> None:
        """What other programs' hands made, and no event would ever move: it is dealt, and dies of what is wrong."""
        stuck = [
            *self.execute(f"{_STUCK} AND due IS NULL RETURNING seq, queue, lane, priority"),
            *self.execute(f"{_STUCK} AND due > ? RETURNING seq, queue, lane, priority", LATEST),
        ]
        self.number_anew()
        self._wait(stuck)

    def number_anew(self) -> None:
        """No number follows the last one: what another program gave such a number gets an ordinary one."""
        if self.execute("SELECT 1 FROM task WHERE seq >= ? LIMIT 1", MOST_NUMBER).fetchone():
            for (seq,) in self.execute("SELECT seq FROM task WHERE seq >= ? ORDER BY seq", MOST_NUMBER).fetchall():
                self.execute(
                    "UPDATE task SET seq = coalesce((SELECT max(seq) FROM task WHERE seq < ?), 0) + 1 WHERE seq = ?",
                    *(MOST_NUMBER, seq),
                )

    def ticks(self, count: int) -> range:
        """That many numbers that no delivery and no turn had before."""
        (last,) = self.execute("UPDATE clock SET tick = tick + ? RETURNING tick", count).fetchone()
        return range(last - count + 1, last + 1)

    def end(self) -> None:
        """The transaction has ended."""
        self._undealt.clear()
        self.woken.clear()
        self.limits.end()


def share(credit_of: Sequence[int | None], cards: int) -> tuple[list[list[int]], list[int]]:
    """Deal ``cards`` one at a time, in turn, to whoever has credit left (None: no limit).

    Each player's cards, and the players that got any, in the order in which their last card came.
    """
    left = dict(enumerate(credit_of))
    hands: list[list[int]] = [[] for _ in credit_of]
    last: dict[int, None] = {}
    card = 0
    while card < cards:
        turn = [player for player, credit in left.items() if credit is None or credit > 0][: cards - card]
        if not turn:
            break
        # As many rounds at once as all of them can take part in.
        finite = [credit for player in turn if (credit := left[player]) is not None]
        rounds = min([(cards - card) // len(turn), *finite])
        after = card + rounds * len(turn)
        for place, player in enumerate(turn):
            hands[player].extend(range(card + place, after, len(turn)))
            credit = left[player]
            left[player] = None if credit is None else credit - rounds
            last.pop(player, None)
            last[player] = None
        card = after
    return hands, list(last)
