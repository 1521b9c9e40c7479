"""Messages as other programs publish them: any bytes in any property, by pika, with confirms."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any
from unittest import mock

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


#: What clients of other languages write, byte for byte: the letter of the type, then the value.
WIRE_VALUES = {
    "a small 64-bit integer": number(7),
    "a 64-bit integer": number(40_000),
    "a large 64-bit integer": number(3_000_000_000),
    "octets": b"b\xf9",
    "an unsigned octet": b"B\xf9",
    "16 bits": b"s\x01\x00",
    "16 unsigned bits": b"u\x9c\x40",
    "32 bits": b"I\x00\x00\x00\x07",
    "32 unsigned bits": b"i\xb2\xd0\x5e\x00",
    "unsigned 64 bits": b"L\xff\x00\x00\x00\x00\x00\x00\x00",
    "single precision": b"f" + struct.pack(">f", 0.1),
    "double precision": b"d" + struct.pack(">d", 0.1),
    "a decimal": b"D\x02\x00\x00\x00\x96",
    "text": text("é".encode()),
    "no UTF-8": text(b"\xff\xfe"),
    "bytes": b"x" + text(b"\x00\xff")[1:],
    "a time": time(1_700_000_000),
    "a time in milliseconds": time(1_700_000_000_123),
    "true": b"t\x01",
    "nothing": b"V",
    "an array": b"A" + sized(number(7) + b"u\x9c\x40" + text(b"a")),
    "a table": b"F"
    + table({b"n": number(7), b"d": b"d" + struct.pack(">d", 0.1), b"deep": b"F" + table({b"u": b"u\x9c@"})}),
}


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


def headers_in(node: Node, queue: str) -> list[dict[bytes, bytes]]:
    """The headers of a queue's messages, byte for byte, each with the letter of its type. The messages stay there."""
    encoded: list[bytes] = []

    def keep(properties: Any, data: bytes, offset: int = 0) -> Any:
        encoded.append(data[offset:])
        return properties

    with (
        mock.patch.object(pika.BasicProperties, "decode", keep),
        pika.BlockingConnection(pika.URLParameters(node.url)) as connection,
    ):
        channel = connection.channel()
        while channel.basic_get(queue)[0] is not None:
            pass
    return [_fields(data) for data in encoded]


def _fields(properties: bytes) -> dict[bytes, bytes]:
    flags, at = int.from_bytes(properties[:2], "big"), 2
    for name in ("content_type", "content_encoding"):
        if flags & 1 << _PROPERTIES[name]:
            at += 1 + properties[at]
    if not flags & 1 << _PROPERTIES["headers"]:
        return {}
    end = at + 4 + int.from_bytes(properties[at : at + 4], "big")
    at += 4
    fields: dict[bytes, bytes] = {}
    while at < end:
        start = at + 1 + properties[at]
        header, at = properties[at + 1 : start], start + _size(properties, start)
        fields[header] = properties[start:at]
    return fields


def _size(data: bytes, at: int) -> int:
    """How long a value is, with the letter of its type."""
    letter = chr(data[at])
    if letter in "SxFA":
        return 5 + int.from_bytes(data[at + 1 : at + 5], "big")
    return 1 + {"V": 0, "t": 1, "b": 1, "B": 1, "s": 2, "u": 2, "I": 4, "i": 4, "f": 4, "D": 5}.get(letter, 8)
