"""What came from the stream lately. A task that this program has enqueued since it listens need not be looked for."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

from leveret.brokers.rabbitmq.statuses.streams import Wanted
from leveret.model import enqueued, newer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.model import Envelope, Status

#: So much is kept of messages that came (bytes), and of tasks that were enqueued.
_MOST_BYTES = 16 * 1024 * 1024
_MOST_TASKS = 20_000


class _Stored(NamedTuple):
    #: How many messages had come before it was stored.
    after: int
    envelope: Envelope


class Recent:
    """The last messages that one reading of the stream brought, and the tasks that were stored meanwhile."""

    def __init__(self) -> None:
        self._is_listening = False
        self._messages: deque[bytes] = deque()
        self._size = 0
        #: How many messages have come, in this reading and those before.
        self._count = 0
        self._stored: OrderedDict[str, _Stored] = OrderedDict()

    def begin(self) -> None:
        """From now on all that is said comes here."""
        self.end()
        self._is_listening = True

    def end(self) -> None:
        """What is said is not heard any more, or some of it was missed."""
        self._is_listening = False
        self._messages.clear()
        self._size = 0
        self._count += 1  # what is being stored began before the next reading
        self._stored.clear()

    def take(self, body: bytes) -> None:
        self._count += 1
        self._messages.append(body)
        self._size += len(body)
        while self._size > _MOST_BYTES:
            self._size -= len(self._messages.popleft())

    @property
    def mark(self) -> int | None:
        """A moment before some tasks are stored; None: nobody listens."""
        return self._count if self._is_listening else None

    def note(self, envelopes: Iterable[Envelope], mark: int | None) -> None:
        """They are stored, since then."""
        if mark is None or mark < self._count - len(self._messages):
            return
        for envelope in envelopes:
            self._stored[envelope.id] = _Stored(mark, envelope)
            self._stored.move_to_end(envelope.id)
        while len(self._stored) > _MOST_TASKS:
            self._stored.popitem(last=False)

    def known(self, ids: Sequence[str]) -> Sequence[Status] | None:
        """What is known of these tasks up to the last message; None: of one more may be known than is here."""
        stored = [self._stored.get(id_) for id_ in ids]
        begun = [one for one in stored if one is not None and one.after >= self._count - len(self._messages)]
        if not ids or len(begun) < len(stored):
            return None
        known = {one.envelope.id: _enqueued(one.envelope) for one in begun}
        wanted = Wanted(ids)
        for index in range(min(one.after for one in begun) - (self._count - len(self._messages)), len(self._messages)):
            for update in wanted.updates(self._messages[index]):
                known[update.id] = newer(known[update.id], update)
        return list(known.values())


def _enqueued(envelope: Envelope) -> Status:
    return enqueued(envelope, envelope.enqueued_at or 0.0)
