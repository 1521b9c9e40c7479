"""Content headers taken apart and put together again as bytes: what many messages are copied by, unread.

pamqp takes some fifty microseconds to decode the properties of a message that has headers, and as long to encode them.
"""

from __future__ import annotations

import msgspec
from pamqp import commands

from leveret.brokers.rabbitmq.amqp.sanitize import content_of

#: Where the flags of a content header are, and where its properties begin.
_FLAGS, _FIRST = 12, 14
_BITS = commands.Basic.Properties.flags
_CONTENT_TYPE, _HEADERS, _PRIORITY = _BITS["content_type"], _BITS["headers"], _BITS["priority"]
_TEXTS = (_BITS["correlation_id"], _BITS["reply_to"], _BITS["expiration"])
#: What such a message has, and what it may not have: a copy cannot keep it as it is.
_WANTED = _HEADERS | _BITS["delivery_mode"] | _BITS["message_id"]
_UNWANTED = _BITS["content_encoding"] | _BITS["user_id"] | _BITS["cluster_id"] | 1
_PERSISTENT = 2
#: How long the values of headers are, by their type; of the others the length stands before them.
_SIZES = {**dict.fromkeys(b"tbB", 1), **dict.fromkeys(b"suU", 2), **dict.fromkeys(b"Iif", 4)}
_SIZES |= {**dict.fromkeys(b"lLdT", 8), ord("V"): 0, ord("D"): 5}
_SIZED = frozenset(b"SxFA")


class SplicedProperties(msgspec.Struct, frozen=True):
    """Properties as they go over the wire, in three pieces: up to the headers, the headers, and the rest."""

    message_id: str
    priority: int | None
    before: bytes
    table: bytes
    after: bytes

    def encode(self) -> bytes:
        """As a content header has them."""
        return b"".join((self.before, len(self.table).to_bytes(4, "big"), self.table, self.after))

    def decoded(self) -> commands.Basic.Properties:
        return content_of(b"\x00\x3c" + bytes(_FLAGS - 2) + self.encode()).properties


def spliced(header: bytes) -> SplicedProperties | None:
    """The properties of a persistent message that has an id and headers (``header``: what is in its content header);
    None for others."""
    flags = int.from_bytes(header[_FLAGS:_FIRST], "big")
    if flags & _WANTED != _WANTED or flags & _UNWANTED:
        return None
    try:
        at = _FIRST + 1 + header[_FIRST] if flags & _CONTENT_TYPE else _FIRST
        begin = at + 4
        end = begin + int.from_bytes(header[at:begin], "big")
        priority, behind = None, end + 1
        if header[end] != _PERSISTENT:
            return None
        if flags & _PRIORITY:
            priority, behind = header[behind], behind + 1
        for text in _TEXTS:
            if flags & text:
                behind += 1 + header[behind]
        id_ = header[behind + 1 : behind + 1 + header[behind]].decode()
    except (IndexError, UnicodeDecodeError):
        return None
    return SplicedProperties(id_, priority, header[_FLAGS:at], header[begin:end], header[end:])


def fields_of(table: bytes) -> dict[bytes, str | None] | None:
    """The names of headers, with the values of those that are text; None: it is no table, or has a name twice."""
    found: dict[bytes, str | None] = {}
    at, size = 0, len(table)
    try:
        while at < size:
            kind_at = at + 1 + table[at]
            name, kind, at = table[at + 1 : kind_at], table[kind_at], kind_at + 1
            text = None
            if kind in _SIZED:
                begin = at + 4
                at = begin + int.from_bytes(table[at:begin], "big")
                text = table[begin:at].decode() if kind == ord("S") else None
            else:
                at += _SIZES[kind]
            if name in found:
                return None
            found[name] = text
    except (IndexError, KeyError, UnicodeDecodeError):
        return None
    return found if at == size else None


def text_field(name: bytes, text: bytes) -> bytes:
    """A header whose value is text."""
    return b"".join((bytes((len(name),)), name, b"S", len(text).to_bytes(4, "big"), text))
