"""What came from the stream lately. What began since then, or was read up on, need not be looked for."""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from leveret.brokers.rabbitmq.statuses.streams import Wanted
from leveret.model import Envelope, enqueued, newer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.model import Status

#: So much is kept of messages that came, and as much of what was known before (bytes); and so many tasks.
_MOST_BYTES = 16 * 1024 * 1024
_MOST_TASKS = 20_000


class Mark(NamedTuple):
    """A moment: which reading it was, and the last offset that had come. Nothing of a later one is missing here."""

    reading: int
    offset: int


class _Base(NamedTuple):
    """What was known of a task at that offset: a message that was stored, or what the stream had told until then."""

    offset: int
    known: Envelope | Status

    @property
    def size(self) -> int:
        """About so many bytes."""
        if isinstance(self.known, Envelope):
            return len(self.known.body)
        return len(self.known.body or b"") + len(bytes(self.known.encoded_result)) + len(self.known.traceback)


class Recent:
    """The last messages that one reading of the stream brought, and tasks of which no earlier ones need be known."""

    def __init__(self) -> None:
        self._reading = 0
        self._is_listening = False
        self._messages: deque[tuple[int, bytes]] = deque()
        self._size = 0
        #: All that came after it is among the messages.
        self._complete_after = -1
        self._latest = -1
        self._bases: OrderedDict[str, _Base] = OrderedDict()
        self._bases_size = 0

    def begin(self) -> None:
        """From now on all that is said comes here."""
        self.end()
        self._is_listening = True

    def end(self) -> None:
        """What is said is not heard any more, or some of it was missed."""
        self._is_listening = False
        self._reading += 1
        self._messages.clear()
        self._size = 0
        self._complete_after = self._latest = -1
        self._bases.clear()
        self._bases_size = 0

    def take(self, offset: int, body: bytes) -> None:
        self._messages.append((offset, body))
        self._latest = offset
        self._size += len(body)
        while self._size > _MOST_BYTES:
            self._complete_after, dropped = self._messages.popleft()
            self._size -= len(dropped)

    @property
    def mark(self) -> Mark | None:
        """A moment before some tasks are stored, or looked for; None: nobody listens."""
        return Mark(self._reading, self._latest) if self._is_listening else None

    def note_stored(self, envelopes: Iterable[Envelope], mark: Mark | None) -> None:
        """They are stored, since then."""
        if mark is not None and self._covers(mark):
            self._add({envelope.id: _Base(mark.offset, envelope) for envelope in envelopes})

    def note_found(self, statuses: Iterable[Status], offset: int, mark: Mark | None) -> None:
        """The stream was read for them since then, up to that offset."""
        if mark is not None and self._covers(mark) and offset >= max(mark.offset, self._complete_after):
            self._add({status.id: _Base(offset, status) for status in statuses})

    def known(self, ids: Sequence[str]) -> Sequence[Status] | None:
        """What is known of these tasks up to the last message; None: of one more may be known than is here."""
        bases = [self._bases[id_] for id_ in ids if id_ in self._bases]
        if not ids or len(bases) < len(ids) or any(base.offset < self._complete_after for base in bases):
            return None
        known = dict(zip(ids, map(_status, bases), strict=True))
        since = dict(zip(ids, (base.offset for base in bases), strict=True))
        wanted = Wanted(ids)
        for offset, body in self._after(min(since.values())):
            for update in wanted.updates(body):
                if offset > since[update.id]:
                    known[update.id] = newer(known[update.id], update)
        return list(known.values())

    def _after(self, offset: int) -> Iterable[tuple[int, bytes]]:
        late = list(takewhile(lambda message: message[0] > offset, reversed(self._messages)))
        return reversed(late)

    def _covers(self, mark: Mark) -> bool:
        return mark.reading == self._reading and mark.offset >= self._complete_after

    def _add(self, bases: dict[str, _Base]) -> None:
        for id_, base in bases.items():
            before = self._bases.pop(id_, None)
            self._bases_size += base.size - (0 if before is None else before.size)
            self._bases[id_] = base
        while self._bases_size > _MOST_BYTES or len(self._bases) > _MOST_TASKS:
            _, base = self._bases.popitem(last=False)
            self._bases_size -= base.size


def _status(base: _Base) -> Status:
    known = base.known
    return enqueued(known, known.enqueued_at or 0.0) if isinstance(known, Envelope) else known
