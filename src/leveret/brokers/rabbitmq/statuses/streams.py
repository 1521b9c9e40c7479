"""Streams: append-only queues (``x-queue-type: stream``, RabbitMQ 3.9 and later) that many may read, from any place.

`leveret.events` tells what becomes of tasks, `leveret.cancelled` which of them shall not run. A message is a *batch*, a
JSON object; a reader that must know all that is there so far sends one with a *sentinel* and reads until it comes.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.brokers.rabbitmq.amqp import Message, content_of
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues import Declaration
from leveret.model import MOST_SKEW, CancelRequest, Status, decoded, is_name, is_plausible, status_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from leveret.brokers.rabbitmq.amqp import Incoming

VERSION = 1
#: Where to begin: an offset, a moment (the chunk of messages that holds it), the oldest, or what comes from now on.
Place: TypeAlias = "int | dt.datetime | str"
#: A stream is cut off in pieces of this size, once they are too old or too many (bytes).
_SEGMENT = 16 * 1024 * 1024
_MOST_EVENTS = 1024 * 1024 * 1024
_MARKS_SEGMENT = 512 * 1024
_MOST_MARKS = 4 * 1024 * 1024
#: RabbitMQ has so many messages on the way to a reader at once.
_PREFETCH = 200
#: For how long nothing may come, though there is something, until a reader counts as deaf (seconds).
SILENCE = 5.0
#: A batch with a sentinel has nothing else in it (bytes).
_LONGEST_SENTINEL = 200
#: How long the last messages of a stream may take to come (seconds).
_ANSWER = 2.0


class Batch(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a stream. Readers ignore a newer version, and members that they do not know."""

    #: Always written, though it is the default: readers in other languages go by it.
    v: int = msgspec.field(default_factory=lambda: VERSION)
    updates: list[Status] = []
    marks: list[CancelRequest] = []
    #: Somebody reads up to here.
    sentinel: str | None = None


def events_declaration(keep: float) -> Declaration:
    """``keep``: how long (seconds); RabbitMQ wants whole ones."""
    return Declaration(
        "leveret.events",
        arguments={
            "x-queue-type": "stream",
            "x-max-age": f"{max(1, round(keep))}s",
            "x-max-length-bytes": _MOST_EVENTS,
            "x-stream-max-segment-size-bytes": _SEGMENT,
        },
    )


def marks_declaration() -> Declaration:
    return Declaration(
        "leveret.cancelled",
        arguments={
            "x-queue-type": "stream",
            "x-max-length-bytes": _MOST_MARKS,
            "x-stream-max-segment-size-bytes": _MARKS_SEGMENT,
        },
    )


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Batch).decode


def to_message(stream: str, batch: Batch) -> Message:
    return message_of(stream, _encode(batch))


def message_of(stream: str, body: bytes) -> Message:
    properties = amqp.Properties(
        content_type="application/json", delivery_mode=2, message_id=f"leveret-{secrets.token_hex(12)}"
    )
    return Message(stream, body, properties, stream)


def new_sentinel() -> str:
    return secrets.token_hex(12)


class Reading:
    """A channel that reads a stream from some place on, and hands each message's body over with its offset.

    RabbitMQ 4.3 may send a reader nothing more, and not tell it, after its node was parted from the others for a while.
    So whoever goes on reading makes sure now and then that it still hears: by a sentinel, or by `last_offset`.
    """

    def __init__(self, line: amqp.Link, stream: str, take: Callable[[int, bytes], None]) -> None:
        self._connection = line.connection
        self._stream = stream
        self._take = take
        self._unacknowledged = 0
        self._last_tag = 0
        self._sentinels: dict[str, asyncio.Future[int]] = {}
        self._channel: amqp.Channel | None = None
        #: RabbitMQ ends a connection that acknowledges on a channel after its closing, and aiormq closes one by itself
        #: when its beginning is given up.
        self._may_acknowledge = False
        self._over = asyncio.Event()
        self._heard_at = float("-inf")
        self._first = 0
        #: RabbitMQ has ended it. As a rule the stream was deleted, and offsets in one of its name are others.
        self.was_cancelled = False

    @property
    def is_over(self) -> bool:
        """Nothing comes any more. That the connection is lost may not show here."""
        return self._over.is_set()

    @property
    def quiet_for(self) -> float:
        """How long nothing has come (seconds)."""
        return asyncio.get_running_loop().time() - self._heard_at

    async def over(self, within: float | None = None) -> bool:
        """Wait until nothing comes any more, at most so long (seconds); whether that is so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._over.wait()
        return self.is_over

    async def hear(self, came: asyncio.Future[int]) -> int:
        """The offset of a sentinel that RabbitMQ has confirmed. Raises LinkLost when nothing comes for too long."""
        self._heard_at = asyncio.get_running_loop().time()
        while not came.done():
            left = SILENCE - self.quiet_for
            if left <= 0:
                raise amqp.LinkLost(f"RabbitMQ has stored what is not read from the stream after {SILENCE:g} s")
            await asyncio.wait([came], timeout=left)
        return came.result()

    async def begin(self, place: Place) -> None:
        """Returned means that nothing from that place on is missed. Raises what aio-pika raises."""
        # A node that lags behind begins where it is.
        self._first = place if isinstance(place, int) else 0
        channel = self._channel = await amqp.open_channel(self._connection, confirms=False)
        channel.closing.add_done_callback(lambda _: self._leave(channel))
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)
        await channel.basic_qos(prefetch_count=_PREFETCH)
        self._connection.take_deliveries(channel.number, self._on_messages)
        arguments: dict[str, Any] = {"x-stream-offset": place}
        await channel.basic_consume(self._stream, _nothing, arguments=arguments)
        self._heard_at = asyncio.get_running_loop().time()
        self._may_acknowledge = not self.is_over
        self._acknowledge()  # all that it may have at once may have come by now

    def _leave(self, channel: amqp.Channel) -> None:
        self._connection.leave_deliveries(channel.number, self._on_messages)
        self.give_up()

    def expect(self, sentinel: str) -> asyncio.Future[int]:
        """Gets the sentinel's offset when it comes, or LinkLost when the reading is over first."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_forget)
        self._sentinels[sentinel] = future
        return future

    async def end(self) -> None:
        self._may_acknowledge = False
        self.give_up()
        if self._channel is not None and not self._channel.is_closed:
            await self._channel.close()

    def give_up(self) -> None:
        """Have it be over for whoever waits on it."""
        self._may_acknowledge = False
        self._over.set()
        for waiting in self._sentinels.values():
            if not waiting.done():
                waiting.set_exception(amqp.LinkLost("RabbitMQ has ended the reading of the stream"))

    def _on_cancel(self, _: amqp.Cancel) -> None:
        self.was_cancelled = True
        self.give_up()

    def _on_messages(self, messages: list[Incoming]) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        for message in messages:
            offset = stream_offset(message.header)
            if offset is not None and offset >= self._first:
                self._take(offset, message.body)
            if offset is not None and self._sentinels and len(message.body) <= _LONGEST_SENTINEL:
                self._look_for_sentinels(offset, message.body)
        self._unacknowledged += len(messages)
        self._last_tag = messages[-1].tag
        self._acknowledge()

    def _look_for_sentinels(self, offset: int, body: bytes) -> None:
        for sentinel in [one for one in self._sentinels if one.encode() in body]:
            waiting = self._sentinels.pop(sentinel)
            if not waiting.done():
                waiting.set_result(offset)

    def _acknowledge(self) -> None:
        """A stream's acknowledgment is only the wish for more."""
        if self._may_acknowledge and self._unacknowledged * 4 >= _PREFETCH:
            assert self._channel is not None
            self._unacknowledged = 0
            self._connection.ask_for_more(self._channel.number, self._last_tag)


#: How a message's offset stands in its header, as RabbitMQ writes it: name, type, and 8 bytes.
_OFFSET = b"\x0fx-stream-offset"
_LONG = b"l"


def stream_offset(header: bytes) -> int | None:
    """Where a message is in its stream; None: it came from no stream."""
    _, found, rest = header.partition(_OFFSET)
    if found and rest.startswith(_LONG) and _OFFSET not in rest:
        return int.from_bytes(rest[1:9], "big")
    offset = (content_of(header).properties.headers or {}).get("x-stream-offset")
    return offset if isinstance(offset, int) else None


async def _nothing(_: amqp.DeliveredMessage) -> None:
    """What comes on a channel that is being closed."""


async def last_offset(connection: amqp.Connection, stream: str) -> int | None:
    """About where a stream ends, without writing to it; None: nothing is in it. Raises what aio-pika raises.

    It may be a few messages further when they were stored together.
    """
    channel = await amqp.open_channel(connection, confirms=False)
    offsets: list[int] = []
    came = asyncio.Event()

    async def take(message: amqp.DeliveredMessage) -> None:
        offset = (message.header.properties.headers or {}).get("x-stream-offset")
        offsets.extend([offset] if isinstance(offset, int) else [])
        came.set()

    try:
        await channel.basic_qos(prefetch_count=_PREFETCH)
        arguments: dict[str, Any] = {"x-stream-offset": "last"}
        answer = await channel.basic_consume(stream, take, arguments=arguments)
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER):
                await came.wait()
        await channel.basic_cancel(answer.consumer_tag or "")  # what is on the way comes before the answer
    finally:
        if not channel.is_closed:
            await amqp.close_channel(channel)
    return max(offsets, default=None)


def _forget(waiting: asyncio.Future[int]) -> None:
    """Nobody may be waiting for it, and its exception is no news then."""
    if not waiting.cancelled():
        waiting.exception()


def read(body: bytes) -> Batch | None:
    """None for what makes no sense here: a stream is open to others. Of updates and marks those that make sense."""
    batch = decoded(_decode, body) or _read_each(body)
    if batch is None or batch.v != VERSION:
        return None
    if all(map(is_plausible, batch.updates)) and all(is_name(mark.id) for mark in batch.marks):
        return batch
    return msgspec.structs.replace(
        batch,
        updates=[update for update in batch.updates if is_plausible(update)],
        marks=[mark for mark in batch.marks if is_name(mark.id)],
    )


class Wanted:
    """Tasks that are looked for. Most messages are about others; they are not decoded."""

    def __init__(self, ids: Iterable[str]) -> None:
        self.ids = frozenset(ids)
        is_plain = len(self.ids) <= _FEW and all(map(_PLAIN.fullmatch, self.ids))
        #: Each as it stands in a message; None: there are too many, or JSON may write one in several ways.
        self._needles = [id_.encode() for id_ in self.ids] if is_plain else None

    def updates(self, body: bytes) -> list[Status]:
        """What a message says of them."""
        if not self._may_be_in(body):
            return []
        batch = read(body)
        return [] if batch is None else [update for update in batch.updates if update.id in self.ids]

    def _may_be_in(self, body: bytes) -> bool:
        if self._needles is not None:
            return any(needle in body for needle in self._needles)
        named = decoded(_decode_ids, body)
        return named is None or any(update.id in self.ids for update in named.updates)


#: Up to so many ids are each looked for as bytes.
_FEW = 8
_PLAIN = re.compile(r"[A-Za-z0-9_.:-]+")


class _Named(msgspec.Struct):
    id: str


class _Ids(msgspec.Struct):
    """A batch of which only the ids are decoded."""

    updates: list[_Named] = []


_decode_ids = msgspec.json.Decoder(_Ids).decode


class _Parts(msgspec.Struct):
    """A batch whose parts are yet to be decoded."""

    v: int
    updates: list[msgspec.Raw] = []
    marks: list[msgspec.Raw] = []
    sentinel: str | None = None


_take_apart = msgspec.json.Decoder(_Parts).decode
_decode_mark = msgspec.json.Decoder(CancelRequest).decode


def _read_each(body: bytes) -> Batch | None:
    """A batch that cannot be read whole: one bad update must not cost those that stand beside it."""
    parts = decoded(_take_apart, body)
    if parts is None:
        return None
    updates = [status_of(bytes(one)) for one in parts.updates]
    marks = [decoded(_decode_mark, bytes(one)) for one in parts.marks]
    return Batch(
        parts.v,
        [update for update in updates if update is not None],
        [mark for mark in marks if mark is not None],
        parts.sentinel,
    )


def place_of(ids: Iterable[str], now: float, keep: float, skew: float = MOST_SKEW) -> Place:
    """Where news of these tasks can begin: ids that Leveret makes begin with the time (milliseconds, 12 hex digits).

    ``skew``: how far their makers' clocks may be from the server's (seconds).
    """
    moments = [_made_at(id_, now) for id_ in ids]
    oldest = min((moment for moment in moments if moment is not None), default=now)
    if None in moments or oldest < now - keep:
        return "first"
    return dt.datetime.fromtimestamp(oldest - skew, dt.UTC)


#: How long after it was made a task is waited for that nothing was told of yet (seconds).
YOUNG = 3.0
_ID_LENGTH = 32
_TIME_DIGITS = 12


def was_just_made(id_: str, now: float, within: float = YOUNG) -> bool:
    """Whether a task is so young, by its id (seconds), that its producer may not have told of it yet."""
    made_at = _made_at(id_, now)
    return made_at is not None and abs(now - made_at) < within


def tells_its_time(id_: str, now: float) -> bool:
    """Whether Leveret has made this id, as far as one can see; then it is one task's alone."""
    return _made_at(id_, now) is not None


def _made_at(id_: str, now: float) -> float | None:
    """None for other ids. Those of other programs have 32 hex digits too, a random UUID's: most are of a far future."""
    if len(id_) != _ID_LENGTH:
        return None
    try:
        int(id_, 16)
        moment = int(id_[:_TIME_DIGITS], 16) / 1000
    except ValueError:
        return None
    return moment if moment <= now + MOST_SKEW else None
