"""What stands between a socket and aiormq, on Leveret's own connections alone. See docs/adr/0012 and 0015.

aiormq gets frame after frame, each of them readable (`foreign`). The deliveries of some channels it does not get: they
are put together here, all that one read of the socket brought, and handed on at once. aiormq would decode each of
their three frames, wake two tasks and start a third one for each message.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING, Any, TypeAlias

import aio_pika
import msgspec
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from pamqp import constants

from leveret.brokers.rabbitmq.amqp.sanitize import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiormq.abc import DeliveredMessage
    from yarl import URL

#: The most that is taken from the stream at once (bytes); it holds less than that.
_MOST = 1 << 20
#: aiormq gives a connection up that has brought it nothing for three heartbeats, and RabbitMQ sends no heartbeat while
#: it sends deliveries. So aiormq gets one from here when it has had nothing for so long (seconds).
_SILENCE = 0.5
_HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
#: A frame's kind, its channel, and the length of what is in it.
_HEAD = struct.Struct(">BHI")
#: The same of a content header's frame, then the class, the weight, and the size of the body.
_CONTENT = struct.Struct(">BHIHHQ")
_METHOD, _HEADER, _BODY = constants.FRAME_METHOD, constants.FRAME_HEADER, constants.FRAME_BODY
_END = constants.FRAME_END
_DELIVER = b"\x00\x3c\x00\x3c"
_GET_OK = b"\x00\x3c\x00\x47"
_CONNECTION_CLOSE = b"\x00\x0a\x00\x32"
#: A delivery's number, and whether it was delivered before.
_NUMBER = struct.Struct(">QB")
#: A whole frame that settles a delivery: kind, channel, length, method, the delivery's number, options, end.
_SETTLE = struct.Struct(">BHIIQBB")
_ACK, _NACK = 0x003C0050, 0x003C0078
_MULTIPLE, _REQUEUE = 1, 2


class Incoming(msgspec.Struct, frozen=True, gc=False):
    """A message as it was delivered."""

    #: The consumer's tag.
    consumer: bytes
    #: The delivery's.
    tag: int
    redelivered: bool
    #: What is in its content header frame.
    header: bytes
    body: bytes


Take: TypeAlias = "Callable[[list[Incoming]], None]"


class Connection(aio_pika.Connection):
    """A connection that reads every message, whatever is in its properties."""

    _stream: _Transport | None = None

    async def connect_to(self, address: str) -> None:
        """Connect to one address of the URL's host."""
        self.kwargs["transport_factory"] = self._stream = _Transport(address)
        await self.connect()

    def abort(self) -> None:
        """Close the socket, whatever waits to be sent."""
        if self._stream is not None and self._stream.writer is not None:
            self._stream.writer.transport.abort()

    @property
    def last_words(self) -> tuple[int, str] | None:
        """With which code and text the server closed the connection; None: it did not, or without a word."""
        return self._stream.frames.last_words if self._stream is not None and self._stream.frames is not None else None

    def __del__(self) -> None:
        """Not aio-pika's, which wants to start a closing in whichever thread collects this: `amqp.close` closes it."""

    @property
    def frames(self) -> FrameReader:
        """What aiormq reads, from when it is connected."""
        assert self._stream is not None
        assert self._stream.frames is not None
        return self._stream.frames

    @property
    def writer(self) -> asyncio.StreamWriter:
        """What aiormq writes to: each of its writes, like anyone's, must be of whole frames."""
        assert self._stream is not None
        assert self._stream.writer is not None
        return self._stream.writer

    def take_deliveries(self, channel: int, take: Take) -> None:
        """Have each delivery of that channel from now on. ``take`` must not raise."""
        self.frames.take_deliveries(channel, take)

    def leave_deliveries(self, channel: int, take: Take) -> None:
        """Have no more of them: the channel is closed, and its number may be another's."""
        self.frames.leave_deliveries(channel, take)

    def ask_for_more(self, channel: int, tag: int) -> None:
        """Acknowledge all deliveries of a channel up to that one. The channel must be open."""
        self.writer.write(_settle(channel, _ACK, tag, _MULTIPLE))

    def as_delivered(self, message: DeliveredMessage) -> Incoming:
        """A message that aiormq handed over, with its content header as it came: after `FrameReader.keep_headers`."""
        tag = message.delivery_tag or 0
        return Incoming(b"", tag, bool(message.redelivered), self.frames.headers.pop(tag), message.body)


class _Transport(TransportFactory):
    """aiormq's own transports, with `FrameReader` between the socket and aiormq."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.frames: FrameReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        factory: TransportFactory = TCPTransportFactory()
        if url.scheme == "amqps":
            # The certificate is for the name.
            factory, kwargs["server_hostname"] = TLSTransportFactory(), url.host
        reader, self.writer = await factory.create(url.with_host(self._address), **kwargs)
        self.frames = FrameReader(reader)
        return self.frames, self.writer


class _Lane:
    """A channel whose deliveries are taken, and the one that is being put together from its frames."""

    def __init__(self, take: Take) -> None:
        self.take = take
        self.taken: list[Incoming] = []
        #: Its consumer's tag, its number, and whether it was delivered before; None: no delivery has begun.
        self.method: tuple[bytes, int, bool] | None = None
        self._header = b""
        self._parts: list[bytes] = []
        self._lacking = 0

    def hand_on(self) -> None:
        if self.taken:
            taken, self.taken = self.taken, []
            self.take(taken)

    def collect_whole(self, channel: int, data: bytes, at: int, header: int) -> int:
        """Take a delivery that is there from its method on, with its body in one frame: nearly every one is so.

        ``header``: where its method frame ends. Returns where the delivery ends; ``at`` if it is another one.
        """
        if not data.startswith(_DELIVER, at + _HEAD.size) or header + _CONTENT.size > len(data):
            return at
        kind, on, length, _, _, lacking = _CONTENT.unpack_from(data, header)
        body = header + _HEAD.size + length + 1
        if (kind, on) != (_HEADER, channel) or body + _HEAD.size > len(data):
            return at
        kind, on, size = _HEAD.unpack_from(data, body)
        end: int = body + _HEAD.size + size + 1
        if (kind, on, size) != (_BODY, channel, lacking) or end > len(data):
            return at
        if not data[header - 1] == data[body - 1] == data[end - 1] == _END:
            return at
        method = _method(data, at + _HEAD.size)
        self.taken.append(Incoming(*method, data[header + _HEAD.size : body - 1], data[body + _HEAD.size : end - 1]))
        return end

    def collect(self, kind: int, data: bytes, at: int, end: int) -> bool:
        """Whether a frame is part of a delivery."""
        begin = at + _HEAD.size
        if kind == _METHOD:
            if not data.startswith(_DELIVER, begin):
                return False
            self.method = _method(data, begin)
            return True
        if self.method is None:
            return False
        if kind == _HEADER:
            self._header = data[begin : end - 1]
            self._lacking = int.from_bytes(data[begin + 4 : begin + 12], "big")
        elif kind == _BODY:
            self._parts.append(data[begin : end - 1])
            self._lacking -= end - 1 - begin
        if self._lacking <= 0:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self.taken.append(Incoming(*self.method, self._header, body))
            self.method, self._parts = None, []
        return True


def _method(data: bytes, begin: int) -> tuple[bytes, int, bool]:
    """Of a delivery's method: the consumer's tag, the delivery's, and whether it was delivered before."""
    name = begin + 5
    stop = name + data[begin + 4]
    tag, mark = _NUMBER.unpack_from(data, stop)
    return data[name:stop], tag, bool(mark & 1)


class FrameReader(asyncio.StreamReader):
    """The part of a stream reader that aiormq uses."""

    def __init__(self, source: asyncio.StreamReader) -> None:
        super().__init__()
        self._source = source
        #: The frame that aiormq reads, and how far it is with it.
        self._frame = b""
        self._at = 0
        #: What was read from the socket, and how much of it is done.
        self._data = b""
        self._done = 0
        self._lanes: dict[int, _Lane] = {}
        #: Sees each other frame first, and says whether it took it: aiormq does not get that one.
        self.take: Callable[[bytes], bool] | None = None
        #: The content headers of messages that aiormq gets, by the numbers of their deliveries: see `keep_headers`.
        self.headers: dict[int, bytes] = {}
        self._keeps_headers = False
        self._latest = 0
        #: Of the server's Connection.Close.
        self.last_words: tuple[int, str] | None = None
        self._clock = asyncio.get_running_loop().time
        self._last_frame = self._clock()

    def take_deliveries(self, channel: int, take: Take) -> None:
        """Hand that channel's deliveries to ``take``, some at once and in their order among the other frames."""
        self._lanes[channel] = _Lane(take)

    def leave_deliveries(self, channel: int, take: Take) -> None:
        """Give aiormq what comes on that channel."""
        if channel in self._lanes and self._lanes[channel].take == take:
            del self._lanes[channel]

    def keep_headers(self) -> None:
        """Keep the content headers of messages that one channel gets from now on: aiormq's lose the types of values."""
        self._keeps_headers = True

    def at_eof(self) -> bool:
        return self._at == len(self._frame) and self._done == len(self._data) and self._source.at_eof()

    async def readexactly(self, n: int) -> bytes:
        if self._at == len(self._frame):
            self._frame, self._at = await self._next(), 0
            self._last_frame = self._clock()
        start, self._at = self._at, self._at + n
        return self._frame[start : self._at]

    async def _next(self) -> bytes:
        """The next frame for aiormq."""
        found = self._look()
        while not found:
            chunk = await self._source.read(_MOST)
            rest = self._data[self._done :]
            if not chunk:
                raise asyncio.IncompleteReadError(rest, len(rest) + 1)
            self._data, self._done = rest + chunk, 0
            found = self._look() or self._sign_of_life()
        return found

    def _sign_of_life(self) -> bytes:
        is_between = all(lane.method is None for lane in self._lanes.values())
        is_taking = is_between and (self._lanes or self.take is not None)
        return _HEARTBEAT if is_taking and self._clock() - self._last_frame > _SILENCE else b""

    def _look(self) -> bytes:
        """Go through what was read, up to the next frame for aiormq; nothing, when there is none in it."""
        data, at, size = self._data, self._done, len(self._data)
        lanes = self._lanes
        found = b""
        while not found and at + _HEAD.size <= size:
            kind, channel, length = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + length + 1
            lane = lanes.get(channel)
            if data.startswith(constants.AMQP, at):
                found, end = data[at:], size  # no frame: the server's answer to a client of another protocol
            elif end > size:
                break
            elif lane is not None and kind == _METHOD and (whole := lane.collect_whole(channel, data, at, end)) > at:
                end = whole
            elif lane is None or data[end - 1] != _END or not lane.collect(kind, data, at, end):
                frame = data[at:end]
                if self._keeps_headers:
                    self._keep(frame)
                if channel == 0 and kind == _METHOD and data.startswith(_CONNECTION_CLOSE, at + _HEAD.size):
                    self.last_words = _reason(frame)
                found = b"" if self.take is not None and self.take(frame) else readable(frame)
            at = end
        self._done = at
        for lane in list(lanes.values()):
            lane.hand_on()
        return found

    def _keep(self, frame: bytes) -> None:
        payload = frame[_HEAD.size : -1]
        if frame[0] == _HEADER:
            self.headers[self._latest] = payload
        elif frame[0] == _METHOD and payload.startswith((_DELIVER, _GET_OK)):
            at = 4 if payload.startswith(_GET_OK) else 5 + payload[4]
            self._latest, _ = _NUMBER.unpack_from(payload, at)


def _reason(frame: bytes) -> tuple[int, str]:
    """The code and the text of a Connection.Close."""
    at = _HEAD.size + len(_CONNECTION_CLOSE)
    text = at + 3
    return int.from_bytes(frame[at : at + 2], "big"), frame[text : text + frame[text - 1]].decode(errors="replace")


def acks(channel: int, tags: Sequence[int], oldest: int | None) -> bytes:
    """The frames that acknowledge some deliveries: one for all before ``oldest``, the first that is not settled yet,
    and one for each after it. Every delivery before ``oldest`` must be among the tags, or have been settled."""
    after = [tag for tag in tags if oldest is not None and tag > oldest]
    upto = max((tag for tag in tags if oldest is None or tag < oldest), default=0)
    together = [_settle(channel, _ACK, upto, _MULTIPLE)] if upto else []
    return b"".join(together + [_settle(channel, _ACK, tag, 0) for tag in after])


def nack(channel: int, tag: int) -> bytes:
    """The frame that returns a delivery to its queue."""
    return _settle(channel, _NACK, tag, _REQUEUE)


def _settle(channel: int, method: int, tag: int, options: int) -> bytes:
    return _SETTLE.pack(_METHOD, channel, _SETTLE.size - _HEAD.size - 1, method, tag, options, _END)
