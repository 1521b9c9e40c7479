"""What the consumers are told: those of this process in its memory, the others by their wake-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.brokers.sqlite.rows import ENVELOPE, MOST_NUMBER, count, read
from leveret.brokers.sqlite.sql import Statements
from leveret.model import CancelRequest, Envelope, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers.sqlite.cancellations import Cancellations
    from leveret.brokers.sqlite.dealing import Dealing
    from leveret.brokers.sqlite.questions import Questions

#: Takes what a consumer was dealt, in the writer's thread.
Receiver: TypeAlias = "Callable[[Dealt | None], None]"


class Claim(msgspec.Struct, frozen=True):
    """A task that was dealt to a consumer."""

    token: int
    returns: int
    envelope: Envelope
    #: Why it cannot run, if its row cannot be read.
    defect: str = ""


class Dealt(msgspec.Struct, frozen=True):
    """What a consumer was dealt, and when the next delayed task of the file is due (Unix time)."""

    claims: list[Claim]
    next_due: float | None
    #: All paused queues of the file.
    paused: frozenset[str] = frozenset()
    #: Of all tasks that it has and that were cancelled.
    marks: list[CancelRequest] = []
    #: Who asks what the consumer does.
    askers: frozenset[int] = frozenset()


class Letters(msgspec.Struct, frozen=True):
    """What is to be told when the transaction is committed."""

    #: To the consumers of this process; None: it is not registered any more.
    own: list[tuple[Receiver, Dealt | None]]
    #: The wake-ups of the other processes' consumers, by name.
    wake_ups: list[str]


class Recipients(Statements):
    """The consumers of this process: who takes what they are dealt, and the newest token that was handed over."""

    def __init__(self, dealing: Dealing, cancellations: Cancellations, questions: Questions) -> None:
        super().__init__(dealing.database)
        self._dealing = dealing
        self._cancellations = cancellations
        self._questions = questions
        self._receivers: dict[int, Receiver] = {}
        self._newest: dict[int, int] = {}
        # What this transaction's commit makes true.
        self._joining: dict[int, Receiver] = {}
        self._read: dict[int, int] = {}

    def join(self, consumer: int, receiver: Receiver) -> None:
        self._joining[consumer] = receiver

    def forget(self, consumer: int) -> None:
        """It is told nothing more."""
        self._receivers.pop(consumer, None)
        self._newest.pop(consumer, None)

    def receivers(self) -> list[Receiver]:
        return list(self._receivers.values())

    def letters(self) -> Letters:
        """What this transaction has for whom: the last that is done before its commit."""
        self._dealing.deal_all()
        receivers = {**self._receivers, **self._joining}
        next_due = None
        if not receivers.keys().isdisjoint(self._dealing.woken):
            next_due = self._dealing.promote()
            if self._dealing.deal_all():
                next_due = self._dealing.next_due()
        own: list[tuple[Receiver, Dealt | None]] = []
        wake_ups: list[str] = []
        for consumer in self._dealing.woken:
            receiver = receivers.get(consumer)
            if receiver is None:
                wake_ups.extend(name for (name,) in self.execute("SELECT bell FROM consumer WHERE id = ?", consumer))
            else:
                own.append((receiver, self._dealt(consumer, next_due)))
        return Letters(own, wake_ups)

    def _dealt(self, consumer: int, next_due: float | None) -> Dealt | None:
        """What the consumer was dealt since it was last told; None when it is not registered."""
        rows = self.execute(
            f"SELECT token, returns, {ENVELOPE} FROM task JOIN queue ON queue.id = task.queue"  # noqa: S608
            " WHERE state = 'running' AND consumer = ? AND token BETWEEN ? AND ? ORDER BY token",
            consumer,
            self._newest.get(consumer, 0) + 1,
            MOST_NUMBER,
        ).fetchall()
        if rows:
            self._read[consumer] = rows[-1][0]
        elif not self.execute("SELECT 1 FROM consumer WHERE id = ?", consumer).fetchone():
            return None
        claims = [self._claim(token, returns, rest) for token, returns, *rest in rows]
        paused = self.execute("SELECT name FROM queue WHERE paused").fetchall()
        return Dealt(
            claims,
            next_due,
            frozenset(name for (name,) in paused),
            self._cancellations.marks(consumer),
            self._questions.unanswered(consumer),
        )

    def _claim(self, token: int, returns: object, columns: Sequence[Any]) -> Claim:
        envelope, defect = read(columns)
        if type(columns[0]) is not str:
            # By its id alone it can be looked at, put back and dropped.
            envelope = msgspec.structs.replace(envelope, id=new_id())
            self.execute("UPDATE task SET id = ? WHERE state = 'running' AND token = ?", envelope.id, token)
        return Claim(token, count(returns), envelope, defect)

    def end(self, *, committed: bool) -> None:
        """The transaction has ended."""
        if committed:
            self._receivers.update(self._joining)
            self._newest.update(self._read)
        self._joining.clear()
        self._read.clear()
