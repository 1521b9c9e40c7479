"""Envelopes as AMQP messages and back: the wire format of docs/wire-format.md. Nothing here may raise on bad input."""

from __future__ import annotations

import datetime as dt
import hashlib
import math
import secrets
from copy import copy
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from leveret.brokers.rabbitmq.amqp import (
    PERSISTENT,
    UNREADABLE,
    Content,
    Message,
    Properties,
    SplicedProperties,
    TaskProperties,
    content_of,
    field,
    fields_of,
    marshal,
    spliced,
    text_field,
)
from leveret.brokers.rabbitmq.queues.topology import dead_queue, delay_queue, gate_queue
from leveret.model import (
    FAIR_KEY,
    LIMITS,
    MIDDLE_PRIORITY,
    STEPS,
    DeadLetter,
    DeadLettered,
    Delivery,
    Envelope,
    Retrying,
    fair_key,
    limit_refs,
    new_id,
    number,
    retried,
    shorten,
    this_process,
)

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.amqp import Incoming
    from leveret.model import Lease, LimitRef

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
#: Says what row of a table this message is: RabbitMQ stores a task that a table's holder enqueues in the table too.
TABLE_ROW = "leveret-row"
#: The permit of a task that was admitted: it is let run with that, and gives it back at its end.
PERMIT = "leveret-permit"
#: Tells apart the copies of a task in the queue where it waits for limits: each stay there is one.
STAY = "leveret-stay"
#: The names of headers that did not fit a copy.
LEFT_OUT = "leveret-left-out"
_OURS = frozenset(
    {
        ATTEMPT,
        ERROR,
        DUE,
        EXPIRES_AT,
        REASON,
        TRACEBACK,
        DIED_AT,
        WORKER,
        REVIVED_AT,
        PRIORITY,
        UNREADABLE,
        LEFT_OUT,
        TABLE_ROW,
        PERMIT,
        STAY,
    }
)
#: The broker's own record of a message's past. Up to RabbitMQ 3.13 it believes a client that sends one.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
#: What is of one copy alone: where else the broker shall deliver it, and that its task was admitted.
_OF_A_COPY = ("CC", "BCC", TABLE_ROW, PERMIT, STAY)
#: A header may claim any attempt; the next one must fit an AMQP integer.
_MOST_ATTEMPTS = 2**62
#: The year 3000, in milliseconds: a header that names a later moment is not one.
_LAST_MOMENT = 32_503_680_000_000
#: As milliseconds, these are days in 1970 to 1973; as seconds, they begin in 2001.
_LIKELY_SECONDS = range(1_000_000_000, 100_000_000_000)
#: How much of a wrong value a reason shows (characters).
_MAX_SHOWN = 100
_MAX_ERROR = 1_000
#: How a stay stands in a message's headers: what is before its value, and how long both are (bytes).
_STAY_SIZE = 16
_STAY_BEGINS = text_field(STAY.encode(), b"x" * _STAY_SIZE)[:-_STAY_SIZE]
_STAY_FIELD = len(_STAY_BEGINS) + _STAY_SIZE
_PERMIT_BYTES = PERMIT.encode()
#: Headers that a copy does not keep as they are, and how long the others may be together (bytes).
_NOT_SPLICED = frozenset(name.encode() for name in (*_OF_A_COPY, PRIORITY, UNREADABLE, LEFT_OUT))
_MOST_SPLICED = 2_048
_BROKERS_BYTES = tuple(name.encode() for name in _BROKERS)
_Limits: TypeAlias = "tuple[tuple[LimitRef, ...], str | None]"
#: Kinds of headers that are known with their limits.
_KEPT = 4_096
#: All headers together must fit one frame. Where they don't, ours are cut first, to so many characters.
_CUTS = ((TRACEBACK, 2_000), (ERROR, 200), (REASON, 400), (TRACEBACK, 200), (REASON, 200))
_MAX_LEFT_OUT = 200
#: What most tasks have as their error, due and expiry.
_NOTHING = (None,) * 3
#: Of a content header, without its properties: the frame's head and end, class, weight and size of the body (bytes).
_FRAME_OVERHEAD = 8 + 12
#: AMQP's priority is an octet.
_MOST_PRIORITY = 255
#: The flags of the properties in a content header. A message that has others is decoded by pamqp.
_CONTENT_TYPE, _DELIVERY_MODE, _PRIORITY, _MESSAGE_ID, _TIMESTAMP, _TYPE = (1 << bit for bit in (15, 12, 11, 7, 6, 5))
_COMMON = _CONTENT_TYPE | _DELIVERY_MODE | _PRIORITY | _MESSAGE_ID | _TIMESTAMP | _TYPE
_TABLE = 1 << 13
#: Properties that a new task has none of.
_RARE = (
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
    "user_id",
    "app_id",
    "cluster_id",
)
#: Headers of ours that say something of the envelope.
_TOLD = _OURS - {PERMIT, STAY, TABLE_ROW}
#: Where the flags of a content header are, and where its properties begin.
_FLAGS, _FIRST = 12, 14
_NO_PROPERTIES = b"\x00\x3c" + bytes(_FIRST - 2)


class RabbitMQDelivery(Delivery, frozen=True, eq=False):
    """A delivery that remembers its message's properties, so that a copy of it keeps them."""

    #: What is in its content header frame. Few deliveries are copied, so it is kept as it came.
    header: bytes = _NO_PROPERTIES
    #: "": it has none.
    permit: str = ""

    @property
    def content(self) -> Content:
        return content_of(self.header)


def changed(delivery: Delivery, envelope: Envelope) -> Delivery:
    """The delivery as if its message had come as this envelope, so that its copies are of that."""
    header = _NO_PROPERTIES[:_FLAGS] + marshal(_properties(envelope))
    kept = {name: getattr(delivery, name) for name in delivery.__struct_fields__}
    return RabbitMQDelivery(**(kept | {"envelope": envelope, "header": header}))


def to_message(envelope: Envelope) -> Message:
    properties = _task_properties(envelope) or _properties(envelope)
    return Message(envelope.queue, envelope.body, properties, envelope.queue, envelope.due)


def _task_properties(one: Envelope) -> TaskProperties | None:
    """The properties of a task that needs no headers and is enqueued now, as most are; None for others."""
    if one.headers or one.attempt > 1 or not one.id or one.enqueued_at is None:
        return None
    if (one.last_error, one.due, one.expires_at) != _NOTHING:
        return None
    return TaskProperties(one.id, one.task, one.content_type, one.priority, int(one.enqueued_at))


def _properties(envelope: Envelope) -> Properties:
    headers = dict(envelope.headers)
    if envelope.attempt > 1:
        headers[ATTEMPT] = envelope.attempt
    if envelope.last_error is not None:
        headers[ERROR] = shorten(envelope.last_error, _MAX_ERROR)
    if envelope.due is not None:
        headers[DUE] = _milliseconds(envelope.due)
    if envelope.expires_at is not None:
        headers[EXPIRES_AT] = _milliseconds(envelope.expires_at)
    return Properties(
        content_type=envelope.content_type,
        delivery_mode=PERSISTENT,
        priority=envelope.priority,
        headers=headers or None,
        message_id=envelope.id,
        message_type=envelope.task,
        timestamp=_timestamp(envelope.enqueued_at),
    )


def received(message: Incoming, queue: str, lease: Lease) -> RabbitMQDelivery:
    envelope = _common_envelope(message.header, message.body, queue)
    if envelope is None:
        return _with_texts(message, queue, lease) or _delivery(message, queue, lease)
    return RabbitMQDelivery(envelope, lease, message.tag, int(message.redelivered), header=message.header)


def _with_texts(message: Incoming, queue: str, lease: Lease) -> RabbitMQDelivery | None:
    """As `_delivery`, of a task whose headers are texts and the producer's own, or say that it was admitted."""
    properties = spliced(message.header)
    fields = None if properties is None else fields_of(properties.table)
    if properties is None or fields is None:
        return None
    texts = {name.decode(errors="replace"): text for name, text in fields.items()}
    if None in texts.values() or texts.keys() & _TOLD or any(name.startswith(_BROKERS) for name in texts):
        return None
    flags = int.from_bytes(properties.before[:2], "big") & ~_TABLE
    header = message.header[:_FLAGS] + flags.to_bytes(2, "big") + properties.before[2:] + properties.after
    envelope = _common_envelope(header, message.body, queue)
    if envelope is None:
        return None
    permit = texts.pop(PERMIT, "") or ""
    others = {name: text for name, text in texts.items() if name not in _OURS}
    envelope = msgspec.structs.replace(envelope, headers=others)
    return RabbitMQDelivery(
        envelope, lease, message.tag, int(message.redelivered), header=message.header, permit=permit
    )


def _delivery(message: Incoming, queue: str, lease: Lease) -> RabbitMQDelivery:
    properties = content_of(message.header).properties
    ours = _OwnHeaders(properties.headers or {})
    envelope = _envelope(properties, ours, message.body, queue, properties.message_id or new_id())
    if ours.defect:
        envelope = msgspec.structs.replace(envelope, due=None, expires_at=None)
    count = (properties.headers or {}).get("x-delivery-count")
    returns = count if type(count) is int else int(message.redelivered)
    return RabbitMQDelivery(envelope, lease, message.tag, returns, ours.defect, message.header, ours.text(PERMIT) or "")


def retry_message(delivery: Delivery, outcome: Retrying, now: float) -> Message:
    """The message again, one attempt older."""
    again = retried(delivery.envelope, outcome, now)
    changed = {ATTEMPT: again.attempt, ERROR: shorten(outcome.error, _MAX_ERROR), DUE: _milliseconds(again.due)}
    return msgspec.structs.replace(_copy(delivery, again.queue, changed), due=again.due)


def postponed(delivery: Delivery) -> Message:
    """The message, to go on its next step."""
    envelope = delivery.envelope
    return msgspec.structs.replace(_copy(delivery, envelope.queue, {}), due=envelope.due)


class Waiting(NamedTuple):
    """A task that waits for its limits."""

    id: str
    #: Which of its stays in the queue this is; "": somebody else put it there.
    stay: str
    refs: tuple[LimitRef, ...]
    fair: str | None
    #: Its priority.
    rank: int
    #: Its properties without its stay, as its copy may have them; None: they are not Leveret's own producers'.
    rest: SplicedProperties | None = None


def to_wait(message: Message) -> Message:
    """The message for where its task waits for its limits."""
    # The stay is the last of the headers, as `_unstayed` wants it.
    stay = secrets.token_hex(_STAY_SIZE // 2)
    properties = _in_pieces(message.properties)
    if properties is not None:
        one, table = properties, properties.table + _STAY_BEGINS + stay.encode()
        waits: Properties | SplicedProperties = SplicedProperties(
            one.message_id, one.priority, one.before, table, one.after
        )
    else:
        waits = writable(message.properties)
        waits.headers = {**(waits.headers or {}), STAY: stay}
    return msgspec.structs.replace(message, queue=gate_queue(message.home), properties=waits)


def _in_pieces(one: Properties | TaskProperties | SplicedProperties) -> SplicedProperties | None:
    """The properties of a new task whose headers are short texts, encoded in a tenth of pamqp's time; None for
    others."""
    if isinstance(one, SplicedProperties):
        return None
    if isinstance(one, TaskProperties):
        headers, id_, task, content_type, sent = {}, one.message_id, one.message_type, one.content_type, one.timestamp
    else:
        if any(map(partial(getattr, one), _RARE)) or one.delivery_mode != PERSISTENT:
            return None
        if one.timestamp is None or not one.message_id:
            return None
        headers, id_, task, content_type = one.headers or {}, one.message_id, one.message_type, one.content_type
        sent = int(one.timestamp.timestamp())
    try:
        texts = [(name, text) for name, text in headers.items() if isinstance(text, str)]
        table = b"".join([text_field(name.encode(), text.encode()) for name, text in texts])
        plain = TaskProperties(id_, task, content_type, one.priority, sent).encode()
    except ValueError:
        return None
    if len(texts) < len(headers) or len(table) > _MOST_SPLICED:
        return None
    # The headers come behind the content type, which is the first of all.
    at = 2 + (1 + len(content_type.encode()) if content_type else 0)
    flags = int.from_bytes(plain[:2], "big") | _TABLE
    return SplicedProperties(id_, one.priority, flags.to_bytes(2, "big") + plain[2:at], table, plain[at:])


def regated(delivery: Delivery) -> Message:
    """A delivery's message, to wait for its limits."""
    return to_wait(_copy(delivery, delivery.envelope.queue, {}))


def waiting(message: Incoming) -> Waiting:
    found = _unstayed(message)
    if found is not None:
        properties, stay, (refs, fair) = found
        rank = MIDDLE_PRIORITY if properties.priority is None else properties.priority
        return Waiting(properties.message_id, stay, refs, fair, rank, properties)
    return _waiting(message)


def _unstayed(message: Incoming) -> tuple[SplicedProperties, str, _Limits] | None:
    """A message that waits as Leveret's own producers have it: without its stay, and that; None for others."""
    properties = spliced(message.header)
    if properties is None or not properties.table[-_STAY_FIELD:].startswith(_STAY_BEGINS):
        return None
    rest, stay = properties.table[:-_STAY_FIELD], properties.table[-_STAY_SIZE:]
    limits = _limits_of(rest)
    if limits is None or not stay.isalnum():
        return None
    one = properties
    return SplicedProperties(one.message_id, one.priority, one.before, rest, one.after), stay.decode(), limits


@lru_cache(_KEPT)
def _limits_of(table: bytes) -> _Limits | None:
    """The limits and the fairness key in headers that a copy may keep as they are; None for others."""
    fields = fields_of(table)
    if fields is None or len(table) > _MOST_SPLICED or fields.keys() & _NOT_SPLICED:
        return None
    if any(name.startswith(_BROKERS_BYTES) for name in fields):
        return None
    headers = {name: text for name in (LIMITS, FAIR_KEY) if (text := fields.get(name.encode())) is not None}
    return limit_refs(headers), fair_key(headers)


def _waiting(message: Incoming) -> Waiting:
    properties = content_of(message.header).properties
    ours = _OwnHeaders(properties.headers or {})
    headers = ours.others()
    rank = ours.priority() if properties.priority is None else properties.priority
    return Waiting(
        properties.message_id or new_id(),
        ours.text(STAY) or "",
        limit_refs(headers),
        fair_key(headers),
        MIDDLE_PRIORITY if rank is None else rank,
    )


def admitted(message: Incoming, queue: str, found: Waiting, permit: str) -> Message:
    """A message that waited, for its task queue. ``found``: what `waiting` says of it."""
    if (one := found.rest) is not None:
        table = one.table + text_field(_PERMIT_BYTES, permit.encode())
        properties = SplicedProperties(found.id, one.priority, one.before, table, one.after)
        return Message(queue, message.body, properties, queue)
    delivery = _delivery(message, queue, _NoLease())
    copied = _copied(delivery, {PERMIT: permit})
    copied.message_id = found.id
    return Message(queue, message.body, copied, queue)


def put_off_message(delivery: Delivery, again: Envelope) -> Message:
    """The message to wait again, for its limits or until it is due."""
    return msgspec.structs.replace(_copy(delivery, again.queue, {DUE: _milliseconds(again.due)}), due=again.due)


def on_step(message: Message, milliseconds: int) -> Message:
    """The message for the delay queue where it waits for so long."""
    return msgspec.structs.replace(message, queue=delay_queue(message.home, milliseconds))


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
    properties = _copied(delivery, changed)
    properties.expiration = None
    queue = delivery.envelope.queue
    return unranked(Message(dead_queue(queue), delivery.envelope.body, properties, queue))


def unranked(message: Message) -> Message:
    """The message, which has headers, with its priority in one of them, where it changes no order."""
    properties = message.properties
    if properties.priority is None:
        return message
    assert isinstance(properties, Properties)
    changed = _with_headers(properties, {**(properties.headers or {}), PRIORITY: properties.priority})
    changed.priority = None
    return msgspec.structs.replace(message, properties=changed)


def stored_anew(message: Incoming, queue: str) -> Message:
    """A dead letter's message, for the same queue: the server counts its returns from 0."""
    content = content_of(message.header)
    properties = _with_headers(content.properties, _kept(content))
    properties.message_id = dead_letter_id(message)
    properties.delivery_mode = PERSISTENT
    properties.expiration = None
    return Message(queue, message.body, properties, queue)


def revived_message(message: Incoming, queue: str, now: float) -> Message:
    """A dead letter's message for another life, as it first came, but enqueued now."""
    delivery = _delivery(message, queue, _NoLease())
    properties = _copied(delivery, {**dict.fromkeys(_OURS), REVIVED_AT: _milliseconds(now)})
    properties.timestamp = _timestamp(now)
    return Message(queue, delivery.envelope.body, properties, queue)


class _NoLease:
    """Of a message that was fetched, not consumed."""

    held = False


def to_dead_letter(message: Incoming, queue: str) -> DeadLetter:
    properties = content_of(message.header).properties
    ours = _OwnHeaders(properties.headers or {})
    return DeadLetter(
        _envelope(properties, ours, message.body, queue, dead_letter_id(message)),
        reason=ours.text(REASON) or ours.text(UNREADABLE) or "(its reason is not recorded)",
        traceback=ours.text(TRACEBACK) or "",
        died_at=ours.moment(DIED_AT),
        worker=ours.text(WORKER),
    )


def peeked(message: Incoming, queue: str) -> Envelope:
    """The task of a message that somebody looks at."""
    properties = content_of(message.header).properties
    return _envelope(properties, _OwnHeaders(properties.headers or {}), message.body, queue, dead_letter_id(message))


def dead_letter_id(message: Incoming) -> str:
    """A dead letter's id. One that came without is known by its content: at every look, and in any program, the same.

    (A task that runs is not: two messages of the same content are two tasks.)
    """
    content = content_of(message.header)
    if content.properties.message_id:
        return content.properties.message_id
    described = marshal(_with_headers(content.properties, _kept(content)))
    return hashlib.sha256(b"%d:%b%b" % (len(described), described, message.body)).hexdigest()[:32]


def fitted(message: Message, frame_max: int) -> Message:
    """The message with headers that fit the one frame that AMQP has for them; what is left out is named in `LEFT_OUT`.

    A server closes the connection of whoever sends a larger frame (``frame_max``: bytes; 0: no limit).
    """
    properties = message.properties
    if isinstance(properties, SplicedProperties):
        if not frame_max or len(properties.encode()) <= frame_max - _FRAME_OVERHEAD:
            return message
        message = msgspec.structs.replace(message, properties=properties.decoded())
        return fitted(message, frame_max)
    if isinstance(properties, TaskProperties) or not properties.headers or not frame_max:
        return message
    room = frame_max - _FRAME_OVERHEAD
    if len(marshal(properties)) <= room:
        return message
    headers = dict(properties.headers)
    properties = _with_headers(properties, headers)
    message = msgspec.structs.replace(message, properties=properties)
    for name, limit in _CUTS:
        if text := _text(headers.get(name)):
            headers[name] = shorten(text, limit)
        if len(marshal(properties)) <= room:
            return message
    headers.pop(LEFT_OUT, None)
    sizes = {name: len(field(name, value)) for name, value in headers.items()}
    rest = len(marshal(properties))
    left_out: list[str] = []
    # Without the steps that follow, nothing may run: they are left out last, and named first.
    for name in sorted(sizes, key=lambda name: (name == STEPS, -sizes[name], name)):
        del headers[name]
        rest -= sizes[name]
        left_out.insert(0 if name == STEPS else len(left_out), name)
        headers[LEFT_OUT] = shorten(", ".join(left_out), _MAX_LEFT_OUT)
        if rest + len(field(LEFT_OUT, headers[LEFT_OUT])) <= room:
            break
    return message


def writable(properties: Properties | TaskProperties | SplicedProperties) -> Properties:
    """A copy that may be changed."""
    if isinstance(properties, SplicedProperties):
        return properties.decoded()
    if not isinstance(properties, TaskProperties):
        return copy(properties)
    return Properties(
        content_type=properties.content_type,
        delivery_mode=PERSISTENT,
        priority=properties.priority,
        message_id=properties.message_id,
        timestamp=_timestamp(properties.timestamp),
        message_type=properties.message_type,
    )


def _with_headers(properties: Properties, headers: dict[str, Any]) -> Properties:
    changed = copy(properties)
    changed.headers = headers
    return changed


def _kept(content: Content) -> dict[str, Any]:
    """The headers that a copy keeps: not the broker's own record, nor where else the first one was to go."""
    # Texts of ours are decoded: they are cut where the headers do not fit their frame.
    texts = {name: value for name, value in (content.properties.headers or {}).items() if isinstance(value, str)}
    return {
        name: texts.get(name, value) if name in _OURS else value
        for name, value in content.headers.items()
        if name not in _OF_A_COPY and not name.startswith(_BROKERS)
    }


def _copy(delivery: Delivery, queue: str, headers: dict[str, Any]) -> Message:
    return Message(queue, delivery.envelope.body, _copied(delivery, headers), delivery.envelope.queue)


def _copied(delivery: Delivery, headers: dict[str, Any]) -> Properties:
    """A message's as they came, but for some headers, the broker's own record and what a copy may not carry."""
    envelope = delivery.envelope
    content = delivery.content if isinstance(delivery, RabbitMQDelivery) else Content(Properties(), {})
    original = content.properties
    kept = {name: value for name, value in _kept(content).items() if name not in headers and name != PRIORITY}
    return Properties(
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


def _envelope(properties: Properties, ours: _OwnHeaders, body: bytes, queue: str, id_: str) -> Envelope:
    return Envelope(
        id=id_,
        queue=queue,
        task=properties.message_type or None,
        body=body,
        content_type=properties.content_type,
        attempt=min(max(1, ours.number(ATTEMPT, 1)), _MOST_ATTEMPTS),
        enqueued_at=_enqueued_at(properties, ours),
        last_error=ours.text(ERROR),
        due=ours.moment(DUE),
        expires_at=ours.moment(EXPIRES_AT),
        headers=ours.others(),
        priority=ours.priority() if properties.priority is None else properties.priority,
        content_encoding=properties.content_encoding or None,
    )


class _OwnHeaders:
    """Leveret's own headers, as a producer in any language may have written them, and what is wrong with them."""

    def __init__(self, headers: dict[str, Any]) -> None:
        self._headers = headers
        self._wrong: list[str] = []

    @property
    def defect(self) -> str:
        """Why the message cannot run; empty if it can."""
        unreadable = self.text(UNREADABLE)
        if (self.text(LEFT_OUT) or "").partition(", ")[0] == STEPS:
            self._wrong.append(f"its header {STEPS}, with the steps that follow, did not fit a frame of this RabbitMQ")
        return "; ".join([unreadable, *self._wrong] if unreadable else self._wrong)

    def others(self) -> dict[str, Any]:
        """The headers that are the producer's."""
        return {
            name: value for name, value in self._headers.items() if name not in _OURS and not name.startswith(_BROKERS)
        }

    def text(self, name: str) -> str | None:
        return _text(self._headers.get(name))

    def number(self, name: str, otherwise: int) -> int:
        found = self._whole(name)
        return otherwise if found is None else found

    def priority(self) -> int | None:
        priority = self._whole(PRIORITY)
        if priority is None or 0 <= priority <= _MOST_PRIORITY:
            return priority
        self._complain(PRIORITY, priority, f"0 to {_MOST_PRIORITY}")
        return None

    def _whole(self, name: str) -> int | None:
        value = self._headers.get(name)
        found = number(value)
        if found is not None and found == int(found):
            return int(found)
        self._complain(name, value, "a whole number (an AMQP integer, or decimal text)")
        return None

    def moment(self, name: str) -> float | None:
        """Unix time (seconds) of a header in milliseconds."""
        value = self._headers.get(name)
        if isinstance(value, dt.datetime):
            return value.timestamp()
        found = number(value)
        if found is None or not 0 <= found <= _LAST_MOMENT:
            self._complain(
                name, value, "Unix time in milliseconds, until the year 3000 (an AMQP integer, or decimal text)"
            )
            return None
        if int(found) in _LIKELY_SECONDS:
            self._complain(name, value, "Unix time in milliseconds, and is one in seconds by its size")
            return None
        return float(found) / 1000

    def _complain(self, name: str, value: object, wanted: str) -> None:
        if value is not None:
            self._wrong.append(f"its header {name} is {shorten(repr(value), _MAX_SHOWN)}: it must be {wanted}")


def _enqueued_at(properties: Properties, ours: _OwnHeaders) -> float | None:
    revived_at = ours.moment(REVIVED_AT)
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
        # The short strings by hand: a call for each costs more than all the rest.
        if flags & _CONTENT_TYPE:
            begin, at = at + 1, at + 1 + header[at]
            content_type = header[begin:at].decode()
        if flags & _DELIVERY_MODE:
            at += 1
        if flags & _PRIORITY:
            priority, at = header[at], at + 1
        if flags & _MESSAGE_ID:
            begin, at = at + 1, at + 1 + header[at]
            id_ = header[begin:at].decode()
        if flags & _TIMESTAMP:
            enqueued_at, at = int.from_bytes(header[at : at + 8], "big"), at + 8
        if flags & _TYPE:
            begin, at = at + 1, at + 1 + header[at]
            task = header[begin:at].decode()
    except (UnicodeDecodeError, IndexError):
        return None
    if at != len(header) or (enqueued_at or 0) >> 32:
        return None  # nonsense, or a time that is not in seconds
    since = None if enqueued_at is None else float(enqueued_at)
    return Envelope(id_ or new_id(), queue, task or None, body, content_type, 1, since, priority=priority)


def _timestamp(seconds: float | None) -> dt.datetime | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC)


def _milliseconds(moment: float | None) -> int | None:
    """A moment for the wire, rounded up: a task may be a millisecond late, not early."""
    return None if moment is None else math.ceil(moment * 1000)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
