"""What is published, and the frames that publish it, put together from cached pieces: most tasks of a queue are alike.

They differ in their id, their time and their body. pamqp encodes each frame anew from its parts, which takes ten times
as long; what has headers, or a foreigner's properties, still goes through it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import msgspec
from pamqp import commands, constants, frame

from leveret.brokers.rabbitmq.amqp.connections import Properties
from leveret.brokers.rabbitmq.amqp.sanitize import marshal
from leveret.brokers.rabbitmq.amqp.splice import SplicedProperties

#: AMQP's delivery mode of a message that outlives its server.
PERSISTENT = 2
#: Queues, and kinds of task, whose pieces are kept.
_KEPT = 1_024
_BASIC = commands.Basic.frame_id
_END = constants.FRAME_END_CHAR
#: Of a frame without its content: type, channel and size, and the end (bytes).
_OVERHEAD = constants.FRAME_HEADER_SIZE + len(_END)
_FRAME = struct.Struct(">BHI")
#: The same, then class, weight and the size of the body.
_CONTENT = struct.Struct(">BHIHHQ")
_CONTENT_FIELDS = _CONTENT.size - _FRAME.size
_TIMESTAMP = struct.Struct(">Q")
_FLAGS = commands.Basic.Properties.flags


class TaskProperties(msgspec.Struct, frozen=True):
    """The properties of a task that has no headers, which most are; pamqp's take ten times as long to make."""

    message_id: str
    message_type: str | None
    content_type: str | None
    priority: int | None
    #: Unix time in whole seconds.
    timestamp: int

    def encode(self) -> bytes:
        """As a content header has them. Raises ValueError for what is too long."""
        before, after = _around(self.content_type, self.priority, self.message_type)
        return before + _short(self.message_id) + _TIMESTAMP.pack(self.timestamp) + after


class Message(msgspec.Struct, frozen=True):
    """What is published: to a queue, through the default exchange."""

    queue: str
    body: bytes
    properties: Properties | TaskProperties | SplicedProperties
    #: The task queue it belongs to; ``queue`` may be that, or its dead-letter queue, or a step of its delays.
    home: str = ""
    #: Unix time before which it must not run; None: it goes to ``queue`` at once.
    due: float | None = None

    @property
    def id(self) -> str:
        return str(self.properties.message_id)


#: Makes a message fit the one frame that AMQP has for its headers; called with the largest frame (bytes; 0: no limit),
#: when it does not.
Fit: TypeAlias = Callable[[Message, int], Message]


class Encoder:
    """The frames of one channel. ``frame_max``: the largest frame (bytes); 0: no limit."""

    def __init__(self, channel: int, frame_max: int, fit: Fit) -> None:
        self._channel = channel
        self._frame_max = frame_max
        self._fit = fit
        self._most = frame_max - _OVERHEAD if frame_max else 2**32 - 1
        self._room = self._most - _CONTENT_FIELDS
        self._method = lru_cache(_KEPT)(self._encode_method)

    def encode(self, message: Message, *, mandatory: bool) -> bytes:
        """All frames of a message. Raises what pamqp raises for a value that AMQP cannot carry."""
        method = self._method(message.queue, mandatory)
        properties = _encoded(message.properties)
        if len(properties) > self._room:
            properties = _encoded(self._fit(message, self._frame_max).properties)
        body = message.body
        size = len(body)
        content = _CONTENT.pack(
            constants.FRAME_HEADER, self._channel, _CONTENT_FIELDS + len(properties), _BASIC, 0, size
        )
        if 0 < size <= self._most:
            head = _FRAME.pack(constants.FRAME_BODY, self._channel, size)
            return b"".join((method, content, properties, _END, head, body, _END))
        return b"".join((method, content, properties, _END, *self._split(body)))

    def _encode_method(self, queue: str, mandatory: bool) -> bytes:
        return frame.marshal(commands.Basic.Publish(routing_key=queue, mandatory=mandatory), self._channel)

    def _split(self, body: bytes) -> list[bytes]:
        """The body in as many frames as it needs: none when it is empty."""
        pieces = [body[at : at + self._most] for at in range(0, len(body), self._most)]
        return [_FRAME.pack(constants.FRAME_BODY, self._channel, len(one)) + one + _END for one in pieces]


def _encoded(properties: Properties | TaskProperties | SplicedProperties) -> bytes:
    return marshal(properties) if isinstance(properties, Properties) else properties.encode()


@lru_cache(_KEPT)
def _around(content_type: str | None, priority: int | None, task: str | None) -> tuple[bytes, bytes]:
    """What stands before a plain task's id, and after its time."""
    flags = _FLAGS["delivery_mode"] | _FLAGS["message_id"] | _FLAGS["timestamp"]
    before = after = b""
    if content_type:
        flags |= _FLAGS["content_type"]
        before += _short(content_type)
    before += bytes([PERSISTENT])
    if priority is not None:
        flags |= _FLAGS["priority"]
        before += bytes([priority])
    if task:
        flags |= _FLAGS["message_type"]
        after = _short(task)
    return flags.to_bytes(2, "big") + before, after


def _short(text: str) -> bytes:
    """An AMQP short string. Raises ValueError when it is too long."""
    raw = text.encode()
    return bytes((len(raw),)) + raw
