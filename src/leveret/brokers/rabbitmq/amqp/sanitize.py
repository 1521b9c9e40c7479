"""Messages that aiormq could not read: made readable between the socket and aiormq (`reading`).

pamqp decodes every frame whole, and aiormq gives the connection up when it can't; the message comes back and ends the
next connection too. So each frame that carries a foreigner's bytes is tried here first, and one that fails is replaced
by its nearest readable form, whose header `UNREADABLE` says what was wrong. See docs/adr/0012.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
from pamqp import commands, constants, decode, encode, frame
from pamqp.header import ContentHeader

from leveret.model import MAX_HEADERS_DEPTH, is_flat

#: What was wrong with a message's properties; it cannot run.
UNREADABLE = "leveret-unreadable"
#: An AMQP short string, in bytes.
_MAX_SHORT = 255
#: Enough to see what is wrong (characters).
_MAX_COMPLAINT = 1_000
_MAX_VALUE = 60
#: AMQP's signed integers that every client decodes: 32 bits (`I`), and 64 (`l`).
_INT, _LONG = struct.Struct(">ci"), struct.Struct(">cq")
_DOUBLE = struct.Struct(">cd")
_FRAME_HEADER = 7
_CONTENT_HEADER = struct.Struct(">HHQ")
_Properties = commands.Basic.Properties
#: What pamqp calls otherwise than AMQP does.
_AMQP_NAMES = {"message_type": "type"}
#: What stands between the consumer's tag and the exchange in a delivery: its number, and the mark of a redelivery.
_TAG_AND_MARK = 9
#: How long a table's values are, by the letter of their type; a value of another type begins with its length.
_SIZES = {
    letter: size
    for letters, size in ((b"V\x00", 0), (b"tbB", 1), (b"su", 2), (b"Iif", 4), (b"D", 5), (b"lLdT", 8))
    for letter in letters
}


def readable(data: bytes) -> bytes:
    """A whole frame as it is, or the nearest that pamqp can read."""
    kind, channel, _ = frame.frame_parts(data)
    if kind == constants.FRAME_HEADER and not _is_plain(data) and _read(data[_FRAME_HEADER:-1]) is None:
        payload = data[_FRAME_HEADER:-1]
        mended = _mended(_Reader(payload, _CONTENT_HEADER.size))
        return _frame(constants.FRAME_HEADER, channel, payload[: _CONTENT_HEADER.size] + marshal(mended))
    if kind == constants.FRAME_METHOD:
        return _with_readable_names(data, channel)
    return data


class WireValue(bytes):
    """A header's value as it stands in its table: the letter of its type, then the value."""


class Content(msgspec.Struct, frozen=True):
    """A message's properties, and its headers once more as they came: a copy keeps their types."""

    properties: commands.Basic.Properties
    #: What could not be read is as it was made readable, all else a `WireValue`.
    headers: dict[str, Any]


def content_of(payload: bytes) -> Content:
    """The properties in a content header frame (``payload``: what is in it), or their nearest readable form."""
    content = _read(payload)
    reader = _Reader(payload, _CONTENT_HEADER.size)
    if content is None:
        properties = _mended(reader)
        complaint: dict[str, Any] = {UNREADABLE: (properties.headers or {})[UNREADABLE]}
        return Content(properties, reader.headers | complaint)
    if content.properties.headers:
        reader.properties()
    return Content(content.properties, reader.headers)


def marshal(properties: commands.Basic.Properties) -> bytes:
    """The properties as a content header has them. Headers that came from elsewhere keep their types.

    pamqp encodes an integer in the smallest type that holds it, and a float in 32 bits; Java, Go and Ruby cannot decode
    some of these types. Raises TypeError or ValueError for a value that AMQP cannot carry.
    """
    flags, pieces = 0, []
    for name, flag in _Properties.flags.items():
        value = getattr(properties, name)
        if value is not None and value != "":
            flags |= flag
            pieces.append(_table(value) if name == "headers" else properties.encode_property(name, value))
    return flags.to_bytes(2, "big") + b"".join(pieces)


def field(name: str, value: Any) -> bytes:
    """One header: its name and its value."""
    return encode.short_string(name) + _field_value(value)


def _table(headers: dict[str, Any]) -> bytes:
    return _sized(b"".join(field(name, value) for name, value in headers.items()))


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def _field_value(value: Any) -> bytes:
    if isinstance(value, WireValue):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return _integer(value)
    if isinstance(value, float):
        # A server closes the connection of whoever sends a float that is no number.
        return _DOUBLE.pack(b"d", value) if math.isfinite(value) else _field_value(repr(value))
    if isinstance(value, dict):
        return b"F" + _table(value)
    if isinstance(value, list):
        return b"A" + _sized(b"".join(map(_field_value, value)))
    return encode.encode_table_value(bytearray(value) if isinstance(value, bytes) else value)


def _integer(value: int) -> bytes:
    try:
        return _INT.pack(b"I", value) if -(2**31) <= value < 2**31 else _LONG.pack(b"l", value)
    except struct.error:
        raise ValueError(f"a header is {value}: an AMQP integer has 64 bits") from None


def sendable(value: Any) -> Any:
    """A value that was read, or the nearest that can be sent: some that are decoded cannot be encoded."""
    if isinstance(value, list):
        return [sendable(item) for item in value]
    if isinstance(value, dict):
        return {name: sendable(item) for name, item in value.items()}
    try:
        _field_value(value)
    except (TypeError, ValueError, ArithmeticError, struct.error):
        return repr(value)
    return value


def _is_plain(data: bytes) -> bool:
    """Whether a content header is certainly readable: a quick look that knows most of them without decoding them."""
    at = _FRAME_HEADER + _CONTENT_HEADER.size
    flags, at = int.from_bytes(data[at : at + 2], "big"), at + 2
    for name, flag in _Properties.flags.items():
        if not flags & flag:
            continue
        kind = _Properties.amqp_type(name)
        if kind == "shortstr":
            end = at + 1 + data[at]
            if not data[at + 1 : end].isascii():
                return False
            at = end
        elif kind == "octet":
            at += 1
        elif kind == "timestamp" and not any(data[at : at + 4]):  # in seconds, until 2106
            at += 8
        else:
            return False
    return at == len(data) - 1


def _read(payload: bytes) -> ContentHeader | None:
    """A content header; None when it cannot be read, or not be handled."""
    content = ContentHeader()
    try:
        content.unmarshal(payload)
    except Exception:  # noqa: BLE001 - struct.error, ValueError, OverflowError, RecursionError: whatever a decoder raises
        return None
    return content if is_flat(content.properties.headers, MAX_HEADERS_DEPTH) else None


def _mended(reader: _Reader) -> commands.Basic.Properties:
    try:
        properties = reader.properties()
        marshal(properties)
    except Exception as error:  # noqa: BLE001 - nothing that a foreigner sends may end the connection
        complaint = _shown(f"its properties cannot be read at all: {type(error).__name__}: {error}", _MAX_COMPLAINT)
        return _Properties(headers={UNREADABLE: complaint})
    return properties


class _Reader:
    """Reads the properties of a message whatever they are, and keeps a list of what was wrong with them."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._wrong: list[str] = []
        #: See `Content.headers`.
        self.headers: dict[str, Any] = {}

    def properties(self) -> commands.Basic.Properties:
        flags = int.from_bytes(self._take(2), "big")
        properties = _Properties()
        for name, flag in _Properties.flags.items():
            if flags & flag:
                setattr(properties, name, self._property(name, _Properties.amqp_type(name)))
        complaint = _shown("its properties cannot be read: " + "; ".join(self._wrong), _MAX_COMPLAINT)
        properties.headers = {**(properties.headers or {}), UNREADABLE: complaint}
        return properties

    def _property(self, name: str, kind: str) -> Any:
        if kind == "shortstr":
            return _cut(self._text(_AMQP_NAMES.get(name, name)))
        if kind == "octet":
            return self._take(1)[0]
        if kind == "timestamp":
            value = self._fixed("timestamp", b"T", self._take(8))
            return None if isinstance(value, (int, str)) else value
        return self._headers()

    def _headers(self) -> dict[str, Any]:
        end = self._end()
        values: dict[str, Any] = {}
        while self._at < end:
            name = _cut(self._text("header"))
            start, wrong = self._at, len(self._wrong)
            values[name] = self._value(name, MAX_HEADERS_DEPTH - 1, end)
            is_read = len(self._wrong) == wrong
            self.headers[name] = WireValue(self._data[start : self._at]) if is_read else values[name]
        return values

    def _take(self, count: int) -> bytes:
        start, self._at = self._at, self._at + count
        if self._at > len(self._data):
            raise ValueError("they end too soon")
        return self._data[start : self._at]

    def _text(self, what: str) -> str:
        raw = self._take(self._take(1)[0])
        text = _text(raw)
        if text.encode() != raw:
            self._wrong.append(f"{what} {_shown(raw)} is not UTF-8, and was read as Latin-1")
        return text

    def _table(self, depth: int) -> dict[str, Any]:
        end = self._end()
        table: dict[str, Any] = {}
        while self._at < end:
            name = _cut(self._text("header"))
            table[name] = self._value(name, depth - 1, end)
        return table

    def _array(self, name: str, depth: int) -> list[Any]:
        end = self._end()
        items = []
        while self._at < end:
            items.append(self._value(name, depth - 1, end))
        return items

    def _end(self) -> int:
        return self._at + int.from_bytes(self._take(4), "big") + 4

    def _value(self, name: str, depth: int, end: int) -> Any:
        kind = self._take(1)
        if kind[0] in _SIZES:
            return self._fixed(f"header {_shown(name)!r}:", kind, self._take(_SIZES[kind[0]]))
        if kind == b"F" and depth > 0:
            return self._table(depth)
        if kind == b"A" and depth > 0:
            return self._array(name, depth)
        if kind in (b"S", b"x", b"F", b"A"):
            return self._sized(name, kind)
        self._wrong.append(f"header {_shown(name)!r} has the unknown type {kind!r}, and was read as bytes")
        return bytearray(self._take(end - self._at))

    def _sized(self, name: str, kind: bytes) -> Any:
        length = self._take(4)
        raw = self._take(int.from_bytes(length, "big"))
        if kind == b"S":
            return sendable(decode.long_str(length + raw)[1])
        if kind != b"x":
            problem = f"is nested more than {MAX_HEADERS_DEPTH} deep, and was read as bytes"
            self._wrong.append(f"header {_shown(name)!r} {problem}")
        return bytearray(raw)

    def _fixed(self, what: str, kind: bytes, raw: bytes) -> Any:
        try:
            return sendable(decode.TABLE_MAPPING[kind](raw)[1])
        except Exception:  # noqa: BLE001 - as in `_read`
            number = int.from_bytes(raw, "big")
            self._wrong.append(f"{what} {number} is no time in seconds or milliseconds")
            return sendable(number)


def _with_readable_names(data: bytes, channel: int) -> bytes:
    """A method frame; in a delivery, the exchange and the routing key that the message was published with."""
    at = _FRAME_HEADER + 4
    index = int.from_bytes(data[_FRAME_HEADER:at], "big")
    if index == commands.Basic.Deliver.index:
        at += 1 + data[at]
    elif index != commands.Basic.GetOk.index:
        return data
    at += _TAG_AND_MARK
    if data[at:-1].isascii():
        return data
    payload, end = data[_FRAME_HEADER:at], at
    for _ in ("exchange", "routing key"):
        start, end = end + 1, end + 1 + data[end]
        name = _cut(_text(data[start:end])).encode()
        payload += bytes([len(name)]) + name
    payload += data[end:-1]
    return _frame(constants.FRAME_METHOD, channel, payload)


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + constants.FRAME_END_CHAR


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _cut(text: str) -> str:
    """The text as a short string: Latin-1 gets longer as UTF-8."""
    return text.encode()[:_MAX_SHORT].decode(errors="ignore")


def _shown(value: object, limit: int = _MAX_VALUE) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
