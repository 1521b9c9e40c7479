"""Envelopes as AMQP messages and back: the wire format of docs/wire-format.md. Nothing here may raise on bad input."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.brokers.rabbitmq.amqp import DeliveredMessage, Properties
from leveret.brokers.rabbitmq.topology import dead_queue
from leveret.model import DeadLetter, DeadLettered, Delivery, Envelope, Retrying, new_id, shorten

if TYPE_CHECKING:
    from leveret.model import Lease

ATTEMPT = "leveret-attempt"
ERROR = "leveret-error"
REASON = "leveret-reason"
TRACEBACK = "leveret-traceback"
DIED_AT = "leveret-died-at"
_OURS = frozenset({ATTEMPT, ERROR, REASON, TRACEBACK, DIED_AT})
#: The broker's own record of a message's past. Up to RabbitMQ 3.13 it believes a client that sends one.
_BROKERS = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count")
_PERSISTENT = 2
#: Headers must fit a frame (128 KiB by default) together.
_MAX_ERROR = 1_000


class Message(msgspec.Struct, frozen=True):
    """What is published: to a queue, through the default exchange."""

    queue: str
    body: bytes
    properties: Properties

    @property
    def id(self) -> str:
        return str(self.properties.message_id)


class RabbitMQDelivery(Delivery, frozen=True, eq=False):
    """A delivery that remembers its message's properties, so that a copy of it keeps them."""

    properties: Properties = Properties()


def to_message(envelope: Envelope) -> Message:
    headers = dict(envelope.headers)
    if envelope.attempt > 1:
        headers[ATTEMPT] = envelope.attempt
    if envelope.last_error is not None:
        headers[ERROR] = shorten(envelope.last_error, _MAX_ERROR)
    properties = Properties(
        content_type=envelope.content_type,
        delivery_mode=_PERSISTENT,
        headers=headers or None,
        message_id=envelope.id,
        message_type=envelope.task,
        timestamp=_timestamp(envelope.enqueued_at),
    )
    return Message(envelope.queue, envelope.body, properties)


def to_delivery(message: DeliveredMessage, queue: str, lease: Lease) -> RabbitMQDelivery:
    properties = message.header.properties
    headers = properties.headers or {}
    returns = _integer(headers.get("x-delivery-count"), int(bool(message.redelivered)))
    return RabbitMQDelivery(
        _envelope(properties, message.body, queue), lease, message.delivery_tag or 0, returns, properties
    )


def retried(delivery: Delivery, outcome: Retrying) -> Message:
    """The message again, one attempt older."""
    changed = {ATTEMPT: delivery.envelope.attempt + 1, ERROR: shorten(outcome.error, _MAX_ERROR)}
    return _copy(delivery, delivery.envelope.queue, changed)


def buried(delivery: Delivery, outcome: DeadLettered, died_at: float) -> Message:
    """The message for the dead-letter queue. It never expires there."""
    changed = {
        ATTEMPT: delivery.envelope.attempt,
        REASON: shorten(outcome.reason, _MAX_ERROR * 4),
        TRACEBACK: shorten(outcome.traceback),
        DIED_AT: died_at,
    }
    message = _copy(delivery, dead_queue(delivery.envelope.queue), changed)
    message.properties.expiration = None
    return message


def to_dead_letter(message: DeliveredMessage, queue: str) -> DeadLetter:
    properties = message.header.properties
    headers = properties.headers or {}
    died_at = headers.get(DIED_AT)
    return DeadLetter(
        _envelope(properties, message.body, queue),
        reason=_text(headers.get(REASON)) or "(its reason is not recorded)",
        traceback=_text(headers.get(TRACEBACK)) or "",
        died_at=float(died_at) if isinstance(died_at, (int, float)) else None,
    )


def _copy(delivery: Delivery, queue: str, headers: dict[str, Any]) -> Message:
    """The message as it came, but for some headers, the broker's own record and what a copy may not carry."""
    envelope = delivery.envelope
    original = delivery.properties if isinstance(delivery, RabbitMQDelivery) else Properties()
    kept = {name: value for name, value in (original.headers or {}).items() if not name.startswith(_BROKERS)}
    properties = Properties(
        content_type=original.content_type,
        content_encoding=original.content_encoding,
        headers={**kept, **headers},
        delivery_mode=_PERSISTENT,
        priority=original.priority,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        expiration=original.expiration,
        message_id=envelope.id,
        timestamp=original.timestamp,
        message_type=original.message_type,
        app_id=original.app_id,
    )
    return Message(queue, envelope.body, properties)


def _envelope(properties: Properties, body: bytes, queue: str) -> Envelope:
    headers = properties.headers or {}
    return Envelope(
        id=properties.message_id or new_id(),
        queue=queue,
        task=properties.message_type or None,
        body=body,
        content_type=properties.content_type,
        attempt=max(1, _integer(headers.get(ATTEMPT), 1)),
        enqueued_at=properties.timestamp.timestamp() if properties.timestamp else None,
        last_error=_text(headers.get(ERROR)),
        headers={name: value for name, value in headers.items() if name not in _OURS and not name.startswith(_BROKERS)},
    )


def _timestamp(seconds: float | None) -> dt.datetime | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC)


def _integer(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
