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

    from leveret.brokers.rabbitmq.amqp.frames import Encoder
    from leveret.brokers.rabbitmq.amqp.message import Message
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
#: Most unconfirmed messages of a channel for one queue with a length limit. RabbitMQ stores what was on the way when it
#: became full, and a second channel of the same program may be sending too.
BOUNDED = 16


class PublishCall:
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


class Limits:
    """Which queues refuse what is over their length, as far as this program knows."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._learnt: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, queue: str) -> bool:
        return queue in self._names or queue in self._learnt

    def __bool__(self) -> bool:
        return bool(self._names or self._learnt)

    def add(self, queue: str) -> None:
        """It was asked for, or seen in the queue's arguments: for good."""
        self._names.add(queue)

    def learn(self, queue: str, seconds: float) -> None:
        """It showed, so a policy has set it, and may be gone again after this time."""
        loop = asyncio.get_running_loop()
        if queue in self._learnt:
            self._learnt[queue].cancel()
        self._learnt[queue] = loop.call_later(seconds, self._learnt.pop, queue)


class _Bounded:
    """What is on the way to queues with a limit: few messages at once, so that few are refused."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        #: By queue: the tags that are on the way, and the calls that wait until there are fewer.
        self.tags: dict[str, set[int]] = {}
        self.parked: dict[str, deque[PublishCall]] = {}

    def is_full(self, queue: str) -> bool:
        """Whether a queue with a limit has as much on the way as it may."""
        return queue in self.limits and len(self.tags.get(queue, ())) >= BOUNDED

    def make_room(self, tags: range, queues: set[str], parcels: deque[PublishCall]) -> None:
        """These are not on the way any more: as many calls as there is room for again go on."""
        for queue in queues & self.tags.keys():
            on_the_way = self.tags[queue]
            on_the_way.difference_update(tags)
            parked = self.parked.get(queue)
            for _ in range(BOUNDED - len(on_the_way)):
                if parked:
                    parcels.append(parked.popleft())
            if not parked:
                self.parked.pop(queue, None)
            if not on_the_way:
                del self.tags[queue]

    def clear(self) -> list[PublishCall]:
        """The calls that waited."""
        parcels = [parcel for parked in self.parked.values() for parcel in parked]
        self.parked.clear()
        self.tags.clear()
        return parcels


class _Silence:
    """For how long the channel has confirmed nothing, and whether the server was asked for a sign of life.

    ``unsent``, ``challenge``, ``patience``: see `ConfirmTracker`.
    """

    def __init__(self, unsent: Callable[[], int], challenge: Callable[[], None] | None, patience: float) -> None:
        self._unsent = unsent
        self._challenge = challenge
        self._patience = patience
        #: How often to look (seconds).
        self.interval = min(SILENCE, patience * 2.5) / _LOOKS
        #: When the channel last confirmed something, or had nothing to confirm (the loop's time).
        self.heard_at = 0.0
        #: When the server was asked for a sign of life that has not come yet.
        self.challenged_at: float | None = None
        #: Bytes, of all that was written.
        self.given = 0
        #: Of the next look.
        self.timer: asyncio.TimerHandle | None = None
        #: At the last look: bytes still here, and gone.
        self._seen = 0, 0

    def left(self, now: float, *, is_blocked: bool) -> float:
        """After how many seconds the channel is silent, as far as it shows now. Asks for a sign of life."""
        if is_blocked or self._is_sending():
            self.heard_at, self.challenged_at = now, None
        elif self._challenge is not None and self.challenged_at is None and now - self.heard_at >= self.interval:
            self.challenged_at = now
            self._challenge()
        left = self.heard_at + SILENCE - now
        return left if self.challenged_at is None else min(left, self.challenged_at + self._patience - now)

    def _is_sending(self) -> bool:
        """Whether some of what was still here at the last look is gone: a large task takes its time on a slow line."""
        (here, before), unsent = self._seen, self._unsent()
        gone = self.given - unsent
        self._seen = unsent, gone
        return here > 0 and gone > before


class _Sent(NamedTuple):
    """A message that waits for its confirm."""

    parcel: PublishCall
    place: int
    message: Message


class ConfirmTracker:
    """See above. ``write``: send bytes, now. ``is_clogged``: whether that had better wait for the next confirm.

    ``unsent``: how many bytes are still here. ``limits``: queues that get few at once. ``challenge``: ask the server
    for a sign of life, which `answered` tells of; one that gives none within ``patience`` (seconds) is given up.
    """

    def __init__(
        self,
        encoder: Encoder,
        write: Callable[[bytes], None],
        is_clogged: Callable[[], bool],
        unsent: Callable[[], int],
        limits: Limits | None = None,
        challenge: Callable[[], None] | None = None,
        patience: float = SILENCE,
    ) -> None:
        self._encode = encoder.encode
        self._write = write
        self._is_clogged = is_clogged
        self._bounded = _Bounded(Limits() if limits is None else limits)
        self._silence = _Silence(unsent, challenge, patience)
        self._loop = asyncio.get_running_loop()
        self._parcels: deque[PublishCall] = deque()
        #: By delivery tag: a channel in confirm mode numbers what is published on it, from 1.
        self._sent: dict[int, _Sent] = {}
        self._last_tag = 0
        #: A returned message tells its id and not its tag, so no two with one id may be on the way at once.
        self._tags: dict[str, int] = {}
        self._flush: asyncio.Handle | None = None
        #: The server takes no publishes now (a memory or disk alarm).
        self.is_blocked = False
        #: Nothing goes out any more.
        self._is_closing = False
        #: Nothing comes back any more either.
        self.is_over = False
        #: Done when nothing is on the way any more; None: it is not retired.
        self._rest: asyncio.Future[None] | None = None

    def post(self, messages: Sequence[Message], *, mandatory: bool = True) -> PublishCall:
        """Send as soon as there is room. A parcel whose ``done`` is cancelled is not sent any further."""
        parcel = PublishCall(messages, self._loop.create_future(), mandatory=mandatory)
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

    def answered(self) -> None:
        """The server has given a sign of life."""
        self._silence.challenged_at = None

    def returned(self, id_: str | None) -> None:
        """No queue takes a message. Its confirm follows, and means nothing."""
        sent = self._sent.get(self._tags.get(id_ or "", 0))
        if sent is not None:
            sent.parcel.refusals[sent.place] = _homeless(sent.message)

    def block(self) -> None:
        self.is_blocked = True

    def unblock(self) -> None:
        self.is_blocked = False
        self._silence.heard_at = self._loop.time()
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
        if self._silence.timer is not None:
            self._silence.timer.cancel()
        parcels = [*self._parcels, *self._bounded.clear(), *(sent.parcel for sent in self._sent.values())]
        self._parcels.clear()
        self._sent.clear()
        self._tags.clear()
        for parcel in parcels:
            parcel.end()
        self._rest_if_done()

    def _rest_if_done(self) -> None:
        if self._rest is not None and not (self._sent or self._parcels or self._bounded.parked or self._rest.done()):
            self._rest.set_result(None)

    def _take(self, tag: int, *, multiple: bool) -> list[_Sent]:
        """The messages that a confirm is about; they are not on the way any more."""
        silence = self._silence
        silence.heard_at = self._loop.time()
        silence.challenged_at = None
        first = next(iter(self._sent), tag) if multiple else tag
        taken = [sent for one in range(first, tag + 1) if (sent := self._sent.pop(one, None)) is not None]
        if self._bounded.tags:
            self._bounded.make_room(range(first, tag + 1), {sent.message.queue for sent in taken}, self._parcels)
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
                self._silence.heard_at = self._loop.time()
            frames = self._next_frames()
            if not frames:
                self._rest_if_done()
                return
            data = b"".join(frames)
            self._silence.given += len(data)
            self._write(data)
            if self._silence.timer is None:
                self._silence.timer = self._loop.call_later(self._silence.interval, self._look)

    def _next_frames(self) -> list[bytes]:
        """What goes out in the next write; it is on the way from now on."""
        frames: list[bytes] = []
        size, room, parcels = 0, min(OUTSTANDING - len(self._sent), _CHUNK), self._parcels
        bounded = self._bounded if self._bounded.limits else None
        while parcels and len(frames) < room and size < _CHUNK_SIZE:
            parcel = parcels[0]
            if parcel.done.done():
                parcels.popleft()
                continue
            place = parcel.written
            message = parcel.messages[place]
            if bounded is not None and bounded.is_full(message.queue):
                bounded.parked.setdefault(message.queue, deque()).append(parcels.popleft())
                continue
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
            if bounded is not None and message.queue in bounded.limits:
                bounded.tags.setdefault(message.queue, set()).add(self._last_tag)
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
        self._silence.timer = None
        if not self._sent:
            self._silence.challenged_at = None
            return
        left = self._silence.left(self._loop.time(), is_blocked=self.is_blocked)
        if left <= 0:
            self.abandon()
        else:
            self._silence.timer = self._loop.call_later(min(left, self._silence.interval), self._look)


def _full(message: Message) -> QueueFull:
    return QueueFull(
        f"RabbitMQ refused a task for queue {message.queue!r}: it is at its length limit; nothing was dropped",
        [message.id],
    )


def _homeless(message: Message) -> QueueNotFound:
    return QueueNotFound(f"RabbitMQ has no queue {message.queue!r} (any more); the task was not stored", [message.id])
