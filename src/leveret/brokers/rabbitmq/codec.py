"""Envelopes as AMQP messages and back: the wire format of docs/wire-format.md. Nothing here may raise on bad input."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
from copy import copy
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.rabbitmq.amqp import DeliveredMessage, Properties
from leveret.brokers.rabbitmq.foreign import UNREADABLE, properties_of, sendable
from leveret.brokers.rabbitmq.topology import dead_queue, delay_queue, rung
from leveret.model import DeadLetter, DeadLettered, Delivery, Envelope, Retrying, new_id, retried, shorten, this_process

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.reading import Incoming
    from leveret.model import Lease

ATTEMPT = "leveret-attempt"
ERROR = "leveret-error"
#: Unix time in whole milliseconds: not before, and not after. (pamqp packs a float into 32 bits, a minute's precision.)
DUE = "leveret-due"
EXPIRES_AT = "leveret-expires-at"
REASON = "leveret-reason"
TRACEBACK = "leveret-traceback"
DIED_AT = "leveret-died-at"
WORKER = "leveret-worker"
#: When a dead letter was put back: the property `timestamp` is of whole seconds, and a cancellation may be as recent.
REVIVED_AT = "leveret-revived-at"
#: The priority of a message that waits where its property would change the order.
PRIORITY = "leveret-priority"
#: The names of headers that did not fit a copy.
LEFT_OUT = "leveret-left-out"
_OURS = frozenset(
    {ATTEMPT, ERROR, DUE, EXPIRES_AT, REASON, TRACEBACK, DIED_AT, WORKER, REVIVED_AT, PRIORITY, UNREADABLE, LEFT_OUT}
)
#: The broker's own record of a message's past. Up to RabbitMQ 3.13 it believes a client that sends one.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
#: Where else the broker shall deliver what is published: that was done with the first copy.
_ROUTES = ("CC", "BCC")
PERSISTENT = 2
#: A header may claim any attempt; the next one must fit an AMQP integer.
_MOST_ATTEMPTS = 2**62
#: The year 3000, in milliseconds: a header that names a later moment is not one.
_LAST_MOMENT = 32_503_680_000_000
_MAX_ERROR = 1_000
#: All headers together must fit one frame. Where they don't, ours are cut first, to so many characters.
_CUTS = ((TRACEBACK, 2_000), (ERROR, 200), (REASON, 400), (TRACEBACK, 200), (REASON, 200))
_MAX_LEFT_OUT = 200
#: Of a content header, without its properties: the frame's head and end, class, weight and size of the body (bytes).
_FRAME_OVERHEAD = 8 + 12
#: AMQP's priority is an octet.
_MOST_PRIORITY = 255
#: The flags of the properties in a content header. A message that has others is decoded by pamqp.
_CONTENT_TYPE, _DELIVERY_MODE, _PRIORITY, _MESSAGE_ID, _TIMESTAMP, _TYPE = (1 << bit for bit in (15, 12, 11, 7, 6, 5))
_COMMON = _CONTENT_TYPE | _DELIVERY_MODE | _PRIORITY | _MESSAGE_ID | _TIMESTAMP | _TYPE
#: Where the flags of a content header are, and where its properties begin.
_FLAGS, _FIRST = 12, 14


class Message(msgspec.Struct, frozen=True):
    """What is published: to a queue, through the default exchange."""

    queue: str
    body: bytes
    properties: Properties
    #: The task queue it belongs to; ``queue`` may be that, or its dead-letter queue, or a rung of its delays.
    home: str = ""
    #: Unix time before which it must not run; None: it goes to ``queue`` at once.
    due: float | None = None

    @property
    def id(self) -> str:
        return str(self.properties.message_id)


class RabbitMQDelivery(Delivery, frozen=True, eq=False):
    """A delivery that remembers its message's properties, so that a copy of it keeps them."""

    #: Few deliveries are copied, so the properties are kept as they came.
    content: Properties | bytes = Properties()

    @property
    def properties(self) -> Properties:
        return self.content if isinstance(self.content, Properties) else properties_of(self.content)


def to_message(envelope: Envelope) -> Message:
    headers = dict(envelope.headers)
    if envelope.attempt > 1:
        headers[ATTEMPT] = envelope.attempt
    if envelope.last_error is not None:
        headers[ERROR] = shorten(envelope.last_error, _MAX_ERROR)
    if envelope.due is not None:
        headers[DUE] = _milliseconds(envelope.due)
    if envelope.expires_at is not None:
        headers[EXPIRES_AT] = _milliseconds(envelope.expires_at)
    properties = Properties(
        content_type=envelope.content_type,
        delivery_mode=PERSISTENT,
        priority=envelope.priority,
        headers=headers or None,
        message_id=envelope.id,
        message_type=envelope.task,
        timestamp=_timestamp(envelope.enqueued_at),
    )
    return Message(envelope.queue, envelope.body, properties, envelope.queue, envelope.due)


def to_delivery(message: DeliveredMessage, queue: str, lease: Lease) -> RabbitMQDelivery:
    redelivered = bool(message.redelivered)
    return _delivery(message.header.properties, message.body, queue, lease, message.delivery_tag or 0, redelivered)


def received(message: Incoming, queue: str, lease: Lease) -> RabbitMQDelivery:
    """As `to_delivery`, for what `reading` took."""
    envelope = _common_envelope(message.header, message.body, queue)
    if envelope is None:
        properties = properties_of(message.header)
        return _delivery(properties, message.body, queue, lease, message.tag, message.redelivered)
    return RabbitMQDelivery(envelope, lease, message.tag, int(message.redelivered), content=message.header)


def _delivery(
    properties: Properties, body: bytes, queue: str, lease: Lease, tag: int, redelivered: bool
) -> RabbitMQDelivery:
    headers = properties.headers or {}
    returns = _integer(headers.get("x-delivery-count"), int(redelivered))
    envelope = _envelope(properties, body, queue, properties.message_id or new_id())
    defect = _text(headers.get(UNREADABLE)) or ""
    if defect:
        envelope = msgspec.structs.replace(envelope, due=None, expires_at=None)
    return RabbitMQDelivery(envelope, lease, tag, returns, defect, properties)


def retry_message(delivery: Delivery, outcome: Retrying, now: float) -> Message:
    """The message again, one attempt older."""
    again = retried(delivery.envelope, outcome, now)
    changed = {ATTEMPT: again.attempt, ERROR: shorten(outcome.error, _MAX_ERROR), DUE: _milliseconds(again.due)}
    return msgspec.structs.replace(_copy(delivery, again.queue, changed), due=again.due)


def postponed(delivery: Delivery) -> Message:
    """The message, to go on its next rung."""
    envelope = delivery.envelope
    return msgspec.structs.replace(_copy(delivery, envelope.queue, {}), due=envelope.due)


def routed(message: Message, now: float) -> tuple[Message, int | None]:
    """The message for where it waits until it is due: a rung (milliseconds), or none in the last eighth of a second."""
    milliseconds = None if message.due is None else rung(message.due - now)
    if milliseconds is None:
        return message, None
    return msgspec.structs.replace(message, queue=delay_queue(message.home, milliseconds)), milliseconds


def buried(delivery: Delivery, outcome: DeadLettered, died_at: float) -> Message:
    """The message for the dead-letter queue. It never expires there, and the oldest is first."""
    changed = {
        ATTEMPT: delivery.envelope.attempt,
        REASON: shorten(outcome.reason, _MAX_ERROR * 4),
        TRACEBACK: shorten(outcome.traceback),
        DIED_AT: _milliseconds(died_at),
        WORKER: this_process(),
        UNREADABLE: None,
    }
    message = _copy(delivery, dead_queue(delivery.envelope.queue), changed)
    message.properties.expiration = None
    return unranked(message)


def unranked(message: Message) -> Message:
    """The message with its priority in a header, where it changes no order."""
    properties = message.properties
    if properties.priority is None:
        return message
    changed = copy(properties)
    changed.headers = {**(properties.headers or {}), PRIORITY: properties.priority}
    changed.priority = None
    return msgspec.structs.replace(message, properties=changed)


def stored_anew(message: DeliveredMessage, queue: str) -> Message:
    """A dead letter's message, for the same queue: the server counts its returns from 0."""
    properties = _with_headers(message.header.properties, _kept(message.header.properties.headers))
    properties.message_id = dead_letter_id(message)
    properties.delivery_mode = PERSISTENT
    properties.expiration = None
    return Message(queue, message.body, properties, queue)


def revived_message(message: DeliveredMessage, queue: str, now: float) -> Message:
    """A dead letter's message for another life, as it first came, but enqueued now."""
    delivery = to_delivery(message, queue, _NoLease())
    again = _copy(delivery, queue, {**dict.fromkeys(_OURS), REVIVED_AT: _milliseconds(now)})
    again.properties.timestamp = _timestamp(now)
    return again


class _NoLease:
    """Of a message that was fetched, not consumed."""

    held = False


def to_dead_letter(message: DeliveredMessage, queue: str) -> DeadLetter:
    properties = message.header.properties
    headers = properties.headers or {}
    return DeadLetter(
        _envelope(properties, message.body, queue, dead_letter_id(message)),
        reason=_text(headers.get(REASON)) or _text(headers.get(UNREADABLE)) or "(its reason is not recorded)",
        traceback=_text(headers.get(TRACEBACK)) or "",
        died_at=_moment(headers.get(DIED_AT)),
        worker=_text(headers.get(WORKER)),
    )


def dead_letter_id(message: DeliveredMessage) -> str:
    """A dead letter's id. One that came without is known by its content: at every look, and in any program, the same.

    (A task that runs is not: two messages of the same content are two tasks.)
    """
    properties = message.header.properties
    if properties.message_id:
        return properties.message_id
    described = _with_headers(properties, _kept(properties.headers)).marshal()
    return hashlib.sha256(b"%d:%b%b" % (len(described), described, message.body)).hexdigest()[:32]


def fitted(message: Message, frame_max: int) -> Message:
    """The message with headers that fit the one frame that AMQP has for them; what is left out is named in `LEFT_OUT`.

    A server closes the connection of whoever sends a larger frame (``frame_max``: bytes; 0: no limit).
    """
    room = frame_max - _FRAME_OVERHEAD
    headers = message.properties.headers
    if not headers or not frame_max or len(message.properties.marshal()) <= room:
        return message
    headers = dict(headers)
    message = msgspec.structs.replace(message, properties=_with_headers(message.properties, headers))
    for name, limit in _CUTS:
        if text := _text(headers.get(name)):
            headers[name] = shorten(text, limit)
        if len(message.properties.marshal()) <= room:
            return message
    sizes = {name: len(Properties(headers={name: value}).marshal()) for name, value in headers.items()}
    left_out: list[str] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        del headers[name]
        left_out.append(name)
        headers[LEFT_OUT] = shorten(", ".join(left_out), _MAX_LEFT_OUT)
        if len(message.properties.marshal()) <= room:
            break
    return message


def _with_headers(properties: Properties, headers: dict[str, Any]) -> Properties:
    changed = copy(properties)
    changed.headers = headers
    return changed


def _kept(headers: dict[str, Any] | None) -> dict[str, Any]:
    """The headers that a copy keeps: not the broker's own record, nor where else the first one was to go."""
    return {
        name: sendable(value)
        for name, value in (headers or {}).items()
        if name not in _ROUTES and not name.startswith(_BROKERS)
    }


def _copy(delivery: Delivery, queue: str, headers: dict[str, Any]) -> Message:
    """The message as it came, but for some headers, the broker's own record and what a copy may not carry."""
    envelope = delivery.envelope
    original = delivery.properties if isinstance(delivery, RabbitMQDelivery) else Properties()
    kept = {name: value for name, value in _kept(original.headers).items() if name not in headers and name != PRIORITY}
    properties = Properties(
        content_type=original.content_type,
        content_encoding=original.content_encoding,
        headers=kept | {name: value for name, value in headers.items() if value is not None},
        delivery_mode=PERSISTENT,
        priority=envelope.priority,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        expiration=original.expiration,
        message_id=envelope.id,
        timestamp=original.timestamp,
        message_type=original.message_type,
        app_id=original.app_id,
    )
    return Message(queue, envelope.body, properties, envelope.queue)


def _envelope(properties: Properties, body: bytes, queue: str, id_: str) -> Envelope:
    headers = properties.headers or {}
    return Envelope(
        id=id_,
        queue=queue,
        task=properties.message_type or None,
        body=body,
        content_type=properties.content_type,
        attempt=min(max(1, _integer(headers.get(ATTEMPT), 1)), _MOST_ATTEMPTS),
        enqueued_at=_enqueued_at(properties, headers),
        last_error=_text(headers.get(ERROR)),
        due=_moment(headers.get(DUE)),
        expires_at=_moment(headers.get(EXPIRES_AT)),
        headers={name: value for name, value in headers.items() if name not in _OURS and not name.startswith(_BROKERS)},
        priority=_priority(headers.get(PRIORITY) if properties.priority is None else properties.priority),
    )


def _enqueued_at(properties: Properties, headers: dict[str, Any]) -> float | None:
    revived_at = _moment(headers.get(REVIVED_AT))
    if revived_at is not None:
        return revived_at
    return properties.timestamp.timestamp() if properties.timestamp else None


def _common_envelope(header: bytes, body: bytes, queue: str) -> Envelope | None:
    """What `_envelope` makes of a content header, for the properties that nearly every task has; None for others."""
    flags = header[_FLAGS] << 8 | header[_FLAGS + 1]
    if flags & ~_COMMON:
        return None
    at = _FIRST
    content_type = task = priority = enqueued_at = None
    id_ = ""
    try:
        if flags & _CONTENT_TYPE:
            content_type, at = _short(header, at)
        if flags & _DELIVERY_MODE:
            at += 1
        if flags & _PRIORITY:
            priority, at = header[at], at + 1
        if flags & _MESSAGE_ID:
            id_, at = _short(header, at)
        if flags & _TIMESTAMP:
            enqueued_at, at = int.from_bytes(header[at : at + 8], "big"), at + 8
        if flags & _TYPE:
            task, at = _short(header, at)
    except (UnicodeDecodeError, IndexError):
        return None
    if at != len(header) or (enqueued_at or 0) >> 32:
        return None  # nonsense, or a time that is not in seconds
    since = None if enqueued_at is None else float(enqueued_at)
    return Envelope(id_ or new_id(), queue, task or None, body, content_type, 1, since, priority=priority)


def _short(data: bytes, at: int) -> tuple[str, int]:
    """An AMQP short string, and where it ends."""
    end = at + 1 + data[at]
    return data[at + 1 : end].decode(), end


def _timestamp(seconds: float | None) -> dt.datetime | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC)


def _integer(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _priority(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= _MOST_PRIORITY else None


def _milliseconds(moment: float | None) -> int | None:
    """A moment for the wire, rounded up: a task may be a millisecond late, not early."""
    return None if moment is None else math.ceil(moment * 1000)


def _moment(value: object) -> float | None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LAST_MOMENT:
        return value / 1000
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
