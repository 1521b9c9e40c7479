"""What is in a table's queue: rows, and hellos. How they look as messages. See docs/adr/0038."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from leveret.brokers.rabbitmq.amqp import (
    PERSISTENT,
    Message,
    Properties,
    SplicedProperties,
    content_of,
    field,
    fields_of,
    text_field,
)
from leveret.brokers.rabbitmq.queues import TABLE_ROW, Declaration, writable
from leveret.model import decoded

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.amqp import Incoming

VERSION = 1
_QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}
#: A row comes back with each holder that ends, and RabbitMQ 4 drops a message after 20 returns by default.
_UNDROPPED = {**_QUORUM, "x-delivery-limit": 2**31 - 1}
#: For how long RabbitMQ 4.3 waits for a holder whose node is gone (milliseconds); 60 s by default.
_DISCONNECTED = 5_000
_HELLO = "leveret.hello"
_ROW = "leveret.row"
#: Most of a row's value that goes in the header of a task (bytes): all headers must fit one frame.
MOST_RIDING = 16 * 1024


class Version(NamedTuple):
    """Which row of a key is the newer one. ``by`` parts two holders that took the same epoch."""

    epoch: int
    number: int
    by: str


class Row(NamedTuple):
    """A row as it was delivered, or as it is to be published."""

    key: str
    version: Version
    #: None: the key was removed.
    value: bytes | None
    #: Whether it came with a task.
    rides: bool = False


class Hello(NamedTuple):
    """Says nothing but that it came back."""

    by: str
    number: int


class Foreign(NamedTuple):
    """What is neither. ``is_kept``: it may be a newer release's row."""

    is_kept: bool


Entry: TypeAlias = "Row | Hello | Foreign"


class _RowHeader(msgspec.Struct, frozen=True, omit_defaults=True):
    """A row without its value, or with the value that rides on a task."""

    v: int
    key: str
    epoch: int
    number: int
    by: str
    value: bytes | None = None
    removed: bool = False


class _HelloBody(msgspec.Struct, frozen=True):
    v: int
    by: str
    number: int


_decode_row = msgspec.json.Decoder(_RowHeader).decode
_decode_hello = msgspec.json.Decoder(_HelloBody).decode


def table_queue(name: str) -> str:
    return f"leveret.table.{name}"


def requests_queue(name: str) -> str:
    return f"{table_queue(name)}.requests"


def table_declaration(name: str) -> Declaration:
    arguments = {**_UNDROPPED, "x-single-active-consumer": True, "x-consumer-disconnected-timeout": _DISCONNECTED}
    return Declaration(table_queue(name), arguments=arguments)


def requests_declaration(name: str) -> Declaration:
    return Declaration(requests_queue(name), arguments=dict(_UNDROPPED))


def row_message(queue: str, row: Row, id_: str) -> Message:
    header = _RowHeader(VERSION, row.key, *row.version, removed=row.value is None)
    return Message(queue, row.value or b"", _properties(_ROW, id_, {TABLE_ROW: _encoded(header)}))


def hello_message(queue: str, hello: Hello, id_: str) -> Message:
    return Message(queue, msgspec.json.encode(_HelloBody(VERSION, hello.by, hello.number)), _properties(_HELLO, id_))


def is_own(message: Message) -> bool:
    """Whether it is a row or a hello, and no task that a row rides on."""
    return isinstance(message.properties, Properties) and message.properties.message_type in (_ROW, _HELLO)


def with_row(queue: str, message: Message, row: Row) -> Message:
    """A task's message that RabbitMQ stores in the table as well, where it is a row.

    One publish, so that the end of this program cannot store the one without the other.
    """
    header = _RowHeader(VERSION, row.key, *row.version, value=row.value)
    if isinstance(message.properties, SplicedProperties):
        one = message.properties
        # First of all: see `_riding_row`.
        table = text_field(_ROW_NAME, msgspec.json.encode(header)) + _route(queue) + one.table
        spliced = SplicedProperties(one.message_id, one.priority, one.before, table, one.after)
        return msgspec.structs.replace(message, properties=spliced)
    properties = writable(message.properties)
    properties.headers = {**(properties.headers or {}), TABLE_ROW: _encoded(header), "BCC": [queue]}
    return msgspec.structs.replace(message, properties=properties)


#: How the content header of a row of ours begins: class, weight and body size; flags; the table's size; the header.
_FLAGS = sum(Properties.flags[name] for name in ("headers", "delivery_mode", "message_id", "message_type"))
_AT_FLAGS, _AT_HEADERS = 12, 18
_HEADERS, _ENCODING, _CONTENT_TYPE = (
    Properties.flags[name] for name in ("headers", "content_encoding", "content_type")
)
_ROW_NAME = TABLE_ROW.encode()
_BEGINS = bytes([len(TABLE_ROW)]) + TABLE_ROW.encode() + b"S"
_ENDS = bytes([len(_ROW)]) + _ROW.encode()
_HELLO_ENDS = bytes([len(_HELLO)]) + _HELLO.encode()
_TEXT = _AT_HEADERS + len(_BEGINS) + 4


def _plain_row(header: bytes, body: bytes) -> Row | None:
    """A row that is no task's, as nearly all are, without decoding all of its properties: a takeover reads thousands.

    RabbitMQ adds headers of its own, behind ours.
    """
    if not (header.startswith(_BEGINS, _AT_HEADERS) and header.endswith(_ENDS)):
        return None
    if int.from_bytes(header[_AT_FLAGS : _AT_FLAGS + 2], "big") != _FLAGS:
        return None
    size = int.from_bytes(header[_TEXT - 4 : _TEXT], "big")
    found = decoded(_decode_row, header[_TEXT : _TEXT + size])
    if found is None or found.v != VERSION:
        return None
    return Row(found.key, Version(found.epoch, found.number, found.by), None if found.removed else body)


@lru_cache
def _route(queue: str) -> bytes:
    """The header that has RabbitMQ store a message in a queue besides."""
    return field("BCC", [queue])


def _riding_row(header: bytes) -> Row | None:
    """A row that comes with a task, without decoding all of its properties."""
    flags = int.from_bytes(header[_AT_FLAGS : _AT_FLAGS + 2], "big")
    if not flags & _HEADERS or flags & _ENCODING:
        return None
    at = _AT_FLAGS + 2
    if flags & _CONTENT_TYPE and len(header) > at:
        at += 1 + header[at]
    at += 4
    if header.startswith(_BEGINS, at):
        text = at + len(_BEGINS) + 4
        encoded = header[text : text + int.from_bytes(header[text - 4 : text], "big")]
    else:
        # RabbitMQ 4 does not keep their order.
        fields = fields_of(header[at : at + int.from_bytes(header[at - 4 : at], "big")])
        encoded = ((fields or {}).get(_ROW_NAME) or "").encode()
    found = decoded(_decode_row, encoded)
    if found is None or found.v != VERSION or found.removed:
        return None
    return Row(found.key, Version(found.epoch, found.number, found.by), found.value, rides=True)


def entry_of(message: Incoming) -> Entry:
    """What a delivery of the table's queue is."""
    if (row := _plain_row(message.header, message.body)) is not None:
        return row
    if message.header.endswith(_HELLO_ENDS) and (hello := decoded(_decode_hello, message.body)) is not None:
        return Hello(hello.by, hello.number)
    if not message.header.endswith(_ENDS) and (riding := _riding_row(message.header)) is not None:
        return riding
    properties = content_of(message.header).properties
    header = (properties.headers or {}).get(TABLE_ROW)
    if header is None:
        return Foreign(is_kept=False)
    found = decoded(_decode_row, header)
    if found is None or found.v != VERSION:
        return Foreign(is_kept=True)
    rides = properties.message_type != _ROW
    value = None if found.removed else found.value if rides else message.body
    return Row(found.key, Version(found.epoch, found.number, found.by), value, rides)


def _encoded(header: _RowHeader) -> str:
    return msgspec.json.encode(header).decode()


def _properties(type_: str, id_: str, headers: dict[str, Any] | None = None) -> Properties:
    return Properties(message_type=type_, message_id=id_, delivery_mode=PERSISTENT, headers=headers)
