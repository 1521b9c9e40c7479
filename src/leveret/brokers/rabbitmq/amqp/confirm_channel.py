"""A channel that publishes past aiormq, on the connection that aiormq opened and keeps alive. See docs/adr/0014.

aiormq takes a task, three futures and three encoded frames for a message, and a scan of all that are on the way for a
confirm of many. Here, frames are written straight to the connection's stream, each write of whole messages, and the
confirms are read from it before aiormq sees them. All calls of one turn of the loop go out in one write: a message
costs no task, future or lock, and a call costs one future.

`ConfirmChannel` reads and writes frames. `ConfirmTracker` has the calls that wait for room, and the messages that wait
for their confirm; it does no I/O of its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

from pamqp import commands, constants, frame
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.amqp import frame_reader as reading
from leveret.brokers.rabbitmq.amqp import sanitize
from leveret.brokers.rabbitmq.amqp.message import Encoder
from leveret.errors import QueueFull, QueueNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pamqp.base import Frame

    from leveret.brokers.rabbitmq.amqp.hosts import Hosts
    from leveret.brokers.rabbitmq.amqp.message import Fit, Message
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
#: How much may wait to be sent to a server that does not read (bytes).
_CLOGGED = 1024 * 1024
_INT = struct.Struct("i")
_TYPE_AND_CHANNEL = struct.Struct(">BH")
#: Where a method frame's class and method begin, and its arguments.
_INDEX = constants.FRAME_HEADER_SIZE
_ARGUMENTS = _INDEX + 4


def _index(method: type[Frame]) -> bytes:
    return struct.pack(">I", method.index)


_ACK = _index(commands.Basic.Ack)
_NACK = _index(commands.Basic.Nack)
_ALIVE = _index(commands.Confirm.SelectOk)
_RETURN = _index(commands.Basic.Return)
_CHANNEL_CLOSE = _index(commands.Channel.Close)
_CONNECTION_CLOSE = _index(commands.Connection.Close)
_BLOCKED = _index(commands.Connection.Blocked)
_UNBLOCKED = _index(commands.Connection.Unblocked)
#: A delivery tag, and whether all up to it are meant (the lowest bit).
_TAG = struct.Struct(">QB")


class ConfirmChannel:
    """One line's publishes. Nobody else may publish on its channel: the numbers of the messages are counted here."""

    def __init__(self, line: amqp.Link, limits: Limits, hosts: Hosts, fit: Fit) -> None:
        connection = line.connection
        assert isinstance(connection, reading.Connection)
        assert connection.transport is not None
        self.line = line
        self._writer = connection.writer
        tune = connection.transport.connection.connection_tune
        encoder = Encoder(line.channel.number, tune.frame_max or 0, fit)
        self.tracker = ConfirmTracker(
            encoder,
            self._writer.write,
            self._is_clogged,
            self._unsent,
            limits,
            # Elsewhere the messages may be stored in time. To the same server they would only be sent twice.
            self._challenge if hosts.have_a_choice else None,
            hosts.patience,
        )
        self._select = frame.marshal(commands.Confirm.Select(), line.channel.number)
        self._proof: asyncio.Future[None] | None = None
        self._channel_method = _TYPE_AND_CHANNEL.pack(constants.FRAME_METHOD, line.channel.number)
        self._channel_header = _TYPE_AND_CHANNEL.pack(constants.FRAME_HEADER, line.channel.number)
        self._channel_body = _TYPE_AND_CHANNEL.pack(constants.FRAME_BODY, line.channel.number)
        self._connection_method = _TYPE_AND_CHANNEL.pack(constants.FRAME_METHOD, 0)
        connection.frames.take = self._take
        line.when_lost(self.tracker.abandon)

    @classmethod
    async def open(cls, hosts: Hosts, limits: Limits, fit: Fit, purpose: str = "producer") -> Self:
        """Raises BrokerUnavailable or BrokerRefused. ``purpose``: names the connection."""
        return cls(await amqp.Link.open(hosts, purpose=purpose, confirms=True), limits, hosts, fit)

    @property
    def is_open(self) -> bool:
        return not (self.tracker.is_over or self.line.is_lost)

    async def answers(self, seconds: float) -> bool:
        """Whether the server gives a sign of life within that time; one that is blocked by an alarm need not."""
        if not self.is_open:
            return False
        if self.tracker.is_blocked:
            return True
        self._challenge()
        proof = self._proof
        assert proof is not None
        await asyncio.wait([proof], timeout=seconds)
        return proof.done() or self.tracker.is_blocked

    def _challenge(self) -> None:
        """Ask what is answered by the channel itself, behind all that was published, and changes nothing."""
        if self._proof is None or self._proof.done():
            self._proof = asyncio.get_running_loop().create_future()
            self._writer.write(self._select)

    def _is_clogged(self) -> bool:
        return self._writer.is_closing() or self._writer.transport.get_write_buffer_size() > _CLOGGED

    def _unsent(self) -> int:
        """Bytes that wait here, and in the system for the other side to have them."""
        waiting = self._writer.transport.get_write_buffer_size()
        socket = self._writer.get_extra_info("socket")
        if socket is None:  # uvloop's of a closed connection
            return waiting
        try:
            queued = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
        except (OSError, ValueError):  # closed, or a system that does not tell
            return waiting
        return waiting + int(_INT.unpack(queued)[0])

    def _take(self, data: bytes) -> bool:
        """Look at a frame; True when it is about what was published here, and no business of aiormq's."""
        beginning = data[: _TYPE_AND_CHANNEL.size]
        if beginning == self._channel_method:
            return self._take_method(data)
        if beginning == self._channel_header:
            _, _, content = frame.unmarshal(sanitize.readable(data))
            if isinstance(content, ContentHeader):
                self.tracker.returned(content.properties.message_id)
            return True
        if beginning == self._connection_method:
            self._look_at_connection(data)
        return beginning == self._channel_body

    def _take_method(self, data: bytes) -> bool:
        index = data[_INDEX:_ARGUMENTS]
        if index == _ACK:
            tag, multiple = _TAG.unpack_from(data, _ARGUMENTS)
            self.tracker.confirmed(tag, multiple=bool(multiple & 1))
        elif index == _NACK:
            tag, multiple = _TAG.unpack_from(data, _ARGUMENTS)
            self.tracker.refused(tag, multiple=bool(multiple & 1))
        elif index == _CHANNEL_CLOSE:
            self.tracker.stop()
        elif index == _ALIVE and self._proof is not None and not self._proof.done():
            self._proof.set_result(None)
            self.tracker.answered()
        return index in (_ACK, _NACK, _RETURN, _ALIVE)

    def _look_at_connection(self, data: bytes) -> None:
        index = data[_INDEX:_ARGUMENTS]
        if index == _BLOCKED:
            self.tracker.block()
        elif index == _UNBLOCKED:
            self.tracker.unblock()
        elif index == _CONNECTION_CLOSE:
            self.tracker.stop()


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

    def make_room(self, tags: range, queues: set[str], calls: deque[PublishCall]) -> None:
        """These are not on the way any more: as many calls as there is room for again go on."""
        for queue in queues & self.tags.keys():
            on_the_way = self.tags[queue]
            on_the_way.difference_update(tags)
            parked = self.parked.get(queue)
            for _ in range(BOUNDED - len(on_the_way)):
                if parked:
                    calls.append(parked.popleft())
            if not parked:
                self.parked.pop(queue, None)
            if not on_the_way:
                del self.tags[queue]

    def clear(self) -> list[PublishCall]:
        """The calls that waited."""
        calls = [call for parked in self.parked.values() for call in parked]
        self.parked.clear()
        self.tags.clear()
        return calls


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

    call: PublishCall
    place: int
    message: Message


class ConfirmTracker:
    """What one channel publishes. ``write``: send bytes, now. ``is_clogged``: whether that had better wait.

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
        self._calls: deque[PublishCall] = deque()
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
        """Send as soon as there is room. A call whose ``done`` is cancelled is not sent any further."""
        call = PublishCall(messages, self._loop.create_future(), mandatory=mandatory)
        if self.is_over:
            call.end()
        else:
            self._calls.append(call)
            self._flush_soon()
        return call

    def confirmed(self, tag: int, *, multiple: bool) -> None:
        """The server has stored a message, or all up to it."""
        for call, place, _ in self._take(tag, multiple=multiple):
            call.settle(place, None)

    def refused(self, tag: int, *, multiple: bool) -> None:
        """The server has not stored a message, or all up to it."""
        for call, place, message in self._take(tag, multiple=multiple):
            call.settle(place, _full(message))

    def answered(self) -> None:
        """The server has given a sign of life."""
        self._silence.challenged_at = None

    def returned(self, id_: str | None) -> None:
        """No queue takes a message. Its confirm follows, and means nothing."""
        sent = self._sent.get(self._tags.get(id_ or "", 0))
        if sent is not None:
            sent.call.refusals[sent.place] = _homeless(sent.message)

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
        calls = [*self._calls, *self._bounded.clear(), *(sent.call for sent in self._sent.values())]
        self._calls.clear()
        self._sent.clear()
        self._tags.clear()
        for call in calls:
            call.end()
        self._rest_if_done()

    def _rest_if_done(self) -> None:
        if self._rest is not None and not (self._sent or self._calls or self._bounded.parked or self._rest.done()):
            self._rest.set_result(None)

    def _take(self, tag: int, *, multiple: bool) -> list[_Sent]:
        """The messages that a confirm is about; they are not on the way any more."""
        silence = self._silence
        silence.heard_at = self._loop.time()
        silence.challenged_at = None
        first = next(iter(self._sent), tag) if multiple else tag
        taken = [sent for one in range(first, tag + 1) if (sent := self._sent.pop(one, None)) is not None]
        if self._bounded.tags:
            self._bounded.make_room(range(first, tag + 1), {sent.message.queue for sent in taken}, self._calls)
        for sent in taken:
            if sent.call.mandatory:
                self._tags.pop(sent.message.id, None)
        if self._calls:
            self._flush_soon()
        if self._rest is not None:
            self._rest_if_done()
        return taken

    def _flush_soon(self) -> None:
        if self._flush is None:
            self._flush = self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flush = None
        while self._calls and not (self._is_closing or self.is_blocked or self._is_clogged()):
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
        size, room, calls = 0, min(OUTSTANDING - len(self._sent), _CHUNK), self._calls
        bounded = self._bounded if self._bounded.limits else None
        while calls and len(frames) < room and size < _CHUNK_SIZE:
            call = calls[0]
            if call.done.done():
                calls.popleft()
                continue
            place = call.written
            message = call.messages[place]
            id_ = message.id
            if bounded is not None and bounded.is_full(message.queue):
                bounded.parked.setdefault(message.queue, deque()).append(calls.popleft())
                continue
            if call.mandatory and id_ in self._tags:
                break
            try:
                encoded = self._encode(message, mandatory=call.mandatory)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this call's, and not its neighbours'
                call.fail(error)
                continue
            frames.append(encoded)
            size += len(encoded)
            self._last_tag += 1
            self._sent[self._last_tag] = _Sent(call, place, message)
            if call.mandatory:
                self._tags[id_] = self._last_tag
            if bounded is not None and message.queue in bounded.limits:
                bounded.tags.setdefault(message.queue, set()).add(self._last_tag)
            call.written += 1
            if call.written == len(call.messages):
                calls.popleft()
        if calls and calls[0].written:
            calls.rotate(-1)  # the rest of a large call lets the others pass
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
