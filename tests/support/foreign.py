"""Messages as other programs publish them: any bytes in any property, by pika, with confirms."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pika

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.nodes import Node

#: In the order of AMQP, and whether the value is a short string.
_PROPERTIES = {
    "content_type": 15,
    "content_encoding": 14,
    "headers": 13,
    "delivery_mode": 12,
    "priority": 11,
    "correlation_id": 10,
    "reply_to": 9,
    "expiration": 8,
    "message_id": 7,
    "timestamp": 6,
    "type": 5,
    "app_id": 3,
    "cluster_id": 2,
}


class Raw(pika.BasicProperties):  # type: ignore[misc]  # pika has no types
    """Properties byte for byte. Short strings are bytes, ``headers`` an encoded `table`, the others numbers."""

    def __init__(self, **given: bytes | int) -> None:
        super().__init__()
        flags, pieces = 0, []
        for name, bit in _PROPERTIES.items():
            value = given.pop(name, None)
            if value is not None:
                flags |= 1 << bit
                pieces.append(_encoded(name, value))
        assert not given, f"no properties of AMQP: {given}"
        self.encoded = struct.pack(">H", flags) + b"".join(pieces)

    def encode(self) -> list[bytes]:
        return [self.encoded]


def _encoded(name: str, value: bytes | int) -> bytes:
    if name == "headers":
        assert isinstance(value, bytes)
        return value
    if isinstance(value, bytes):
        return short(value)
    return struct.pack(">Q" if name == "timestamp" else "B", value)


def short(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def sized(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def table(fields: dict[bytes, bytes]) -> bytes:
    """A field table of encoded values, each with the letter of its type."""
    return sized(b"".join(short(name) + value for name, value in fields.items()))


def text(value: bytes) -> bytes:
    return b"S" + sized(value)


def number(value: int) -> bytes:
    return b"l" + struct.pack(">q", value)


def time(value: int) -> bytes:
    return b"T" + struct.pack(">Q", value)


def nested_arrays(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"A" + sized(value)
    return value


def nested_tables(depth: int) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = b"F" + table({b"k": value})
    return value


def publish(
    node: Node,
    queue: str,
    messages: Iterable[tuple[Any, bytes]],
    *,
    routing_key: bytes | None = None,
    declare: bool = True,
) -> None:
    """Make the queue as any program would, and publish to it; with a ``routing_key``, through a fanout exchange."""
    with pika.BlockingConnection(pika.URLParameters(node.url)) as connection:
        channel = connection.channel()
        if declare:
            channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
        channel.confirm_delivery()
        exchange = ""
        if routing_key is not None:
            exchange = f"to-{queue}"
            channel.exchange_declare(exchange, "fanout", auto_delete=True)
            channel.queue_bind(queue, exchange)
        for properties, body in messages:
            key = queue if routing_key is None else routing_key
            channel.basic_publish(exchange, key, body, properties, mandatory=True)
