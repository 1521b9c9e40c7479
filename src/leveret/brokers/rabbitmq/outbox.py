"""What one channel publishes: calls that wait for room, and messages that wait for their confirm. No I/O of its own.

All calls of one turn of the loop go out in one write. A message costs no task, future or lock; a call costs one future.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from leveret.errors import QueueFull, QueueNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers.rabbitmq.codec import Message
    from leveret.brokers.rabbitmq.frames import Encoder
    from leveret.errors import EnqueueError

#: Most unconfirmed messages of one channel; more wait. RabbitMQ's documentation advises 100 to 1,000.
OUTSTANDING = 512
#: Most messages of a write: the server begins with them while the next ones are encoded.
_CHUNK = 128
#: A write is not made longer when it is as long as this (bytes).
_CHUNK_SIZE = 64 * 1024
#: A channel that confirms nothing for so long, and is not blocked, is silent (seconds).
SILENCE = 5.0
#: How many looks that takes.
_LOOKS = 5


class Parcel:
    """One call's messages on one channel, until each is settled or the channel is given up."""

    def __init__(self, messages: Sequence[Message], done: asyncio.Future[None], *, mandatory: bool) -> None:
        #: Done when nothing is pending any more, or nothing will come of it.
        self.done = done
        self.messages = messages
        self.mandatory = mandatory
        #: How many were written; the rest waits.
        self.written = 0
        #: Neither confirmed nor refused, by their place.
        self.pending = dict(enumerate(messages))
        #: Why messages were not stored, by their place.
        self.refusals: dict[int, EnqueueError] = {}

    @property
    def unstored(self) -> list[Message]:
        """What is not known to be stored, in order."""
        return [self.messages[place] for place in sorted(self.pending.keys() | self.refusals.keys())]

    def settle(self, place: int, refusal: EnqueueError | None) -> None:
        self.pending.pop(place, None)
        if refusal is not None:
            self.refusals.setdefault(place, refusal)
        if not self.pending:
            self.end()

    def end(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class _Sent(NamedTuple):
    """A message that waits for its confirm."""

    parcel: Parcel
    place: int
    message: Message


class Outbox:
    """See above. ``write``: send bytes, now. ``is_clogged``: whether that had better wait for the next confirm.

    ``unsent``: how many bytes are still here.
    """

    def __init__(
        self,
        encoder: Encoder,
        write: Callable[[bytes], None],
        is_clogged: Callable[[], bool],
        unsent: Callable[[], int],
    ) -> None:
        self._encode = encoder.encode
        self._write = write
        self._is_clogged = is_clogged
        self._unsent = unsent
        self._loop = asyncio.get_running_loop()
        self._parcels: deque[Parcel] = deque()
        #: By delivery tag: a channel in confirm mode numbers what is published on it, from 1.
        self._sent: dict[int, _Sent] = {}
        self._last_tag = 0
        #: A returned message tells its id and not its tag, so no two with one id may be on the way at once.
        self._tags: dict[str, int] = {}
        self._flush: asyncio.Handle | None = None
        self._watch: asyncio.TimerHandle | None = None
        #: When the channel last confirmed something, or had nothing to confirm (the loop's time).
        self._heard_at = 0.0
        #: Bytes, of all that was given to ``write``.
        self._given = 0
        #: At the last look: bytes still here, and gone.
        self._seen = 0, 0
        #: The server takes no publishes now (a memory or disk alarm).
        self.is_blocked = False
        #: Nothing goes out any more.
        self._is_closing = False
        #: Nothing comes back any more either.
        self.is_over = False
        #: Done when nothing is on the way any more; None: it is not retired.
        self._rest: asyncio.Future[None] | None = None

    def post(self, messages: Sequence[Message], *, mandatory: bool = True) -> Parcel:
        """Send as soon as there is room. A parcel whose ``done`` is cancelled is not sent any further."""
        parcel = Parcel(messages, self._loop.create_future(), mandatory=mandatory)
        if self.is_over:
            parcel.end()
        else:
            self._parcels.append(parcel)
            self._flush_soon()
        return parcel

    def confirmed(self, tag: int, *, multiple: bool) -> None:
        """The server has stored a message, or all up to it."""
        for parcel, place, _ in self._take(tag, multiple=multiple):
            parcel.settle(place, None)

    def refused(self, tag: int, *, multiple: bool) -> None:
        """The server has not stored a message, or all up to it."""
        for parcel, place, message in self._take(tag, multiple=multiple):
            parcel.settle(place, _full(message))

    def returned(self, id_: str | None) -> None:
        """No queue takes a message. Its confirm follows, and means nothing."""
        sent = self._sent.get(self._tags.get(id_ or "", 0))
        if sent is not None:
            sent.parcel.refusals[sent.place] = _homeless(sent.message)

    def block(self) -> None:
        self.is_blocked = True

    def unblock(self) -> None:
        self.is_blocked = False
        self._heard_at = self._loop.time()
        self._flush_soon()

    def retire(self) -> asyncio.Future[None]:
        """Nobody posts any more: done when all that was posted is settled, or the channel is lost."""
        if self._rest is None:
            self._rest = self._loop.create_future()
            self._rest_if_done()
        return self._rest

    def stop(self) -> None:
        """Write nothing any more: the channel is being closed, and `abandon` follows."""
        self._is_closing = True

    def abandon(self) -> None:
        """The channel is lost, or given up: what is pending may be stored or not."""
        self.is_over = self._is_closing = True
        if self._watch is not None:
            self._watch.cancel()
        parcels = [*self._parcels, *(sent.parcel for sent in self._sent.values())]
        self._parcels.clear()
        self._sent.clear()
        self._tags.clear()
        for parcel in parcels:
            parcel.end()
        self._rest_if_done()

    def _rest_if_done(self) -> None:
        if self._rest is not None and not (self._sent or self._parcels or self._rest.done()):
            self._rest.set_result(None)

    def _take(self, tag: int, *, multiple: bool) -> list[_Sent]:
        """The messages that a confirm is about; they are not on the way any more."""
        self._heard_at = self._loop.time()
        first = next(iter(self._sent), tag) if multiple else tag
        taken = [sent for one in range(first, tag + 1) if (sent := self._sent.pop(one, None)) is not None]
        for sent in taken:
            if sent.parcel.mandatory:
                self._tags.pop(sent.message.id, None)
        if self._parcels:
            self._flush_soon()
        if self._rest is not None:
            self._rest_if_done()
        return taken

    def _flush_soon(self) -> None:
        if self._flush is None:
            self._flush = self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush = None
        while self._parcels and not (self._is_closing or self.is_blocked or self._is_clogged()):
            if not self._sent:
                self._heard_at = self._loop.time()
            frames = self._next_frames()
            if not frames:
                self._rest_if_done()
                return
            data = b"".join(frames)
            self._given += len(data)
            self._write(data)
            if self._watch is None:
                self._watch = self._loop.call_later(SILENCE / _LOOKS, self._look)

    def _next_frames(self) -> list[bytes]:
        """What goes out in the next write; it is on the way from now on."""
        frames: list[bytes] = []
        size, room, parcels = 0, min(OUTSTANDING - len(self._sent), _CHUNK), self._parcels
        while parcels and len(frames) < room and size < _CHUNK_SIZE:
            parcel = parcels[0]
            if parcel.done.done():
                parcels.popleft()
                continue
            place = parcel.written
            message = parcel.messages[place]
            if parcel.mandatory and message.id in self._tags:
                break
            try:
                encoded = self._encode(message, mandatory=parcel.mandatory)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this call's, and not its neighbours'
                parcel.fail(error)
                continue
            frames.append(encoded)
            size += len(encoded)
            self._last_tag += 1
            self._sent[self._last_tag] = _Sent(parcel, place, message)
            if parcel.mandatory:
                self._tags[message.id] = self._last_tag
            parcel.written += 1
            if parcel.written == len(parcel.messages):
                parcels.popleft()
        if parcels and parcels[0].written:
            parcels.rotate(-1)  # the rest of a large call lets the others pass
        return frames

    def _look(self) -> None:
        """Give the channel up when it is silent.

        A quorum queue of RabbitMQ 3.10 may never confirm what is published while its node starts, before the queue
        has a leader: only sending it again on a new connection helps.
        """
        self._watch = None
        if not self._sent:
            return
        if self.is_blocked or self._is_sending():
            self._heard_at = self._loop.time()
        patience = self._heard_at + SILENCE - self._loop.time()
        if patience <= 0:
            self.abandon()
        else:
            self._watch = self._loop.call_later(min(patience, SILENCE / _LOOKS), self._look)

    def _is_sending(self) -> bool:
        """Whether some of what was still here at the last look is gone: a large task takes its time on a slow line."""
        (here, before), unsent = self._seen, self._unsent()
        gone = self._given - unsent
        self._seen = unsent, gone
        return here > 0 and gone > before


def _full(message: Message) -> QueueFull:
    return QueueFull(
        f"RabbitMQ refused a task for queue {message.queue!r}: it is at its length limit; nothing was dropped",
        [message.id],
    )


def _homeless(message: Message) -> QueueNotFound:
    return QueueNotFound(f"RabbitMQ has no queue {message.queue!r} (any more); the task was not stored", [message.id])
