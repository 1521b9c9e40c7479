"""What a worker and its child say to each other, and the frames it travels in.

A batch is a msgpack array of messages. It travels in frames: `_MAGIC`, whether more of the batch follows, the length
and the CRC-32 of the piece (big-endian), and the piece. The descriptors are in a process that runs anybody's code, so
other things may be written into them: what is no frame is seen at once, not taken for the length of an endless one.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from socket import MSG_WAITALL
from struct import Struct
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar, cast
from zlib import crc32

import msgspec

from leveret.brokers import censor
from leveret.errors import LeveretError
from leveret.executors.base import (
    START_TIMEOUT,
    STOP_TIMEOUT,
    Awaits,
    Blocks,
    Finished,
    Manifest,
    Progressed,
    Report,
    Returned,
    RunRequest,
    Started,
)
from leveret.executors.loops import Loop
from leveret.model import Succeeded
from leveret.observe import Logging

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Import the application and get ready. ``url`` overrides the application's own."""

    app: str
    url: str | None
    concurrency: int
    #: How it logs, unless the application decides that; None: the application alone does.
    logs: Logging | None = None
    loop: Loop = "auto"
    #: Seconds to import the application and to enter its lifespan, and to leave it.
    start_timeout: float = START_TIMEOUT
    stop_timeout: float = STOP_TIMEOUT

    def __repr__(self) -> str:
        return f"Begin({self.app!r}, {censor(self.url or '')!r}, {self.concurrency})"


class Run(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Run jobs when slots are free."""

    jobs: list[RunRequest]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Have jobs not run, or end if they do."""

    keys: list[int]


class Recall(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Give back the jobs that wait for a slot."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The application is imported, and its lifespan is entered if it has one."""

    manifest: Manifest
    #: Its source files, as far as they are imported now.
    sources: list[str]
    has_lifespan: bool = False


class NotLoaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The application can't be imported, or its lifespan not be entered."""

    reason: str
    #: Of its own code.
    traceback: str = ""


class Turns(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The event loop turns again, after `Blocks`."""


class Unfit(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A task has left the process in a state in which others fail, too; sent before their outcomes."""

    reason: str


ToChild: TypeAlias = Begin | Run | Cancel | Recall
ToWorker: TypeAlias = Ready | NotLoaded | Started | Progressed | Finished | Returned | Blocks | Turns | Unfit | Awaits
Message: TypeAlias = "ToChild | ToWorker | Report"
M = TypeVar("M")

_MAGIC = b"\xf1LV"
_MORE, _LAST = b"+", b"."
_HEADER = Struct(">3scII")
#: No piece is longer (bytes), so that a batch begins to be of use before all of it is there.
PIECE = 128 * 1024
#: No batch is longer (bytes).
_MOST_BYTES = 1 << 30
#: So much is on its way to the kernel at once; what else is to be sent waits as messages (bytes).
_UNSENT = 2 * PIECE


class BrokenFrames(LeveretError):
    """What came is not what `frames` makes; ``batches``: what came before it and was whole."""

    batches: Sequence[bytes] = ()


def frames(body: bytes) -> Iterator[bytes | memoryview]:
    """The frames of one batch; of a long one the headers and the pieces, which are not copied."""
    if len(body) <= PIECE:
        yield _HEADER.pack(_MAGIC, _LAST, len(body), crc32(body)) + body
        return
    view = memoryview(body)
    for at in range(0, len(body), PIECE):
        piece = view[at : at + PIECE]
        kind = _LAST if at + PIECE >= len(body) else _MORE
        yield _HEADER.pack(_MAGIC, kind, len(piece), crc32(piece))
        yield piece


def runs(jobs: Sequence[RunRequest]) -> Iterator[Run]:
    """The jobs as messages of about one piece at most, but for a job that is longer."""
    some: list[RunRequest] = []
    size = 0
    for job in jobs:
        some.append(job)
        size += len(job.envelope.body)
        if size >= PIECE:
            yield Run(some)
            some, size = [], 0
    if some:
        yield Run(some)


def encoded(messages: Sequence[Message]) -> bytes:
    """One batch, for those who have no `Pipe`."""
    return b"".join(frames(msgspec.msgpack.encode(messages)))


def read_begin(connection: socket.socket) -> Begin | None:
    """The first message to a child, read before it has an event loop; None: its worker is gone."""
    reader = FrameReader()
    while True:
        header = connection.recv(_HEADER.size, MSG_WAITALL)
        length = _HEADER.unpack(header)[2] if len(header) == _HEADER.size else 0
        data = header + (connection.recv(length, MSG_WAITALL) if length else b"")
        if not data:
            return None
        for body in reader.feed(data):
            return msgspec.msgpack.decode(body, type=list[Begin])[0]


class FrameReader:
    """From what is read, in whatever pieces, to the batches in it. A byte is copied a few times at most."""

    def __init__(self) -> None:
        #: The beginning of a frame: never more than a frame and one read.
        self._rest = bytearray()
        #: The pieces of a batch that is not whole.
        self._pieces: list[bytes] = []
        self._size = 0

    @property
    def is_within(self) -> bool:
        """Whether what has come ends in the middle of a batch."""
        return bool(self._rest or self._pieces)

    def feed(self, data: bytes) -> list[bytes]:
        """The batches that are whole now. Raises BrokenFrames."""
        if self._rest:
            self._rest += data
            batches, read = self._read(self._rest)
            del self._rest[:read]
        else:
            batches, read = self._read(data)
            if read < len(data):
                self._rest += memoryview(data)[read:]
        return batches

    def _read(self, data: bytes | bytearray) -> tuple[list[bytes], int]:
        """The batches, and how much of the data is frames that are whole."""
        batches: list[bytes] = []
        try:
            return batches, self._read_into(batches, data)
        except BrokenFrames as error:
            error.batches = batches
            raise

    def _read_into(self, batches: list[bytes], data: bytes | bytearray) -> int:
        at = 0
        with memoryview(data) as view:
            while len(view) - at >= _HEADER.size:
                magic, kind, length, check = _HEADER.unpack_from(view, at)
                if magic != _MAGIC or kind not in (_MORE, _LAST) or length > PIECE:
                    raise BrokenFrames(f"{bytes(view[at : at + _HEADER.size])!r} is not the beginning of a frame")
                end = at + _HEADER.size + length
                if end > len(view):
                    break
                piece = bytes(view[at + _HEADER.size : end])
                if crc32(piece) != check:
                    raise BrokenFrames(f"a frame of {length} bytes is not as it was sent")
                self._take(piece, kind, batches)
                at = end
            rest = bytes(view[at : at + len(_MAGIC)])
            if not _MAGIC.startswith(rest):
                raise BrokenFrames(f"{rest!r} is not the beginning of a frame")
        return at

    def _take(self, piece: bytes, kind: bytes, batches: list[bytes]) -> None:
        if kind == _LAST and not self._pieces:
            batches.append(piece)
            return
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > _MOST_BYTES:
            raise BrokenFrames(f"a batch of more than {_MOST_BYTES} bytes")
        if kind == _LAST:
            batches.append(b"".join(self._pieces))
            self._pieces.clear()
            self._size = 0


class Pipe(asyncio.Protocol, Generic[M]):
    """One end of a socket pair: writes any messages, and hands on those of type M, all at once that a read brought."""

    def __init__(self, reads: Any) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[reads])
        self._reader = FrameReader()
        self._unsent: deque[Message] = deque()
        self._is_full = False
        self._written = 0
        #: Why what comes makes no sense, if so: the other process, or what runs in it, wrote something else.
        self.broken: str | None = None
        #: When something came last (monotonic, seconds).
        self.heard_at = time.monotonic()
        #: Called with what comes.
        self.hear: Callable[[list[M]], None] = _nobody
        #: Done when nothing comes any more: the other process is gone, or what it writes makes no sense any more.
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, end: socket.socket, reads: Any) -> Self:
        """A pipe over a socket, which is its own from now on."""
        _, pipe = await asyncio.get_running_loop().create_connection(lambda: cls(reads), sock=end)
        return pipe

    @property
    def sent(self) -> int:
        """How many bytes the kernel has taken since the beginning. While that grows the other process reads."""
        return self._written - self._transport.get_write_buffer_size()

    @property
    def is_within(self) -> bool:
        """Whether what came ends in the middle of a batch."""
        return self._reader.is_within

    def write(self, messages: Sequence[Message]) -> None:
        """Queue messages for sending. A peer that is gone shows by the end, never here."""
        self._unsent.extend(messages)
        self._send()

    async def first(self) -> list[M]:
        """What comes first; empty when that is the end."""
        came: asyncio.Future[list[M]] = asyncio.get_running_loop().create_future()
        self.hear = came.set_result
        ends: list[asyncio.Future[Any]] = [came, self.ended]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return came.result() if came.done() else []

    def close(self) -> None:
        """Hear nothing any more, and end when what was begun to be sent is sent."""
        self._unsent.clear()
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By what it is for: uvloop's transports are no subclasses.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_UNSENT)

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self._send()

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        try:
            batches: Sequence[bytes] = self._reader.feed(data)
        except BrokenFrames as error:
            self.broken = str(error)
            batches = error.batches
        try:
            messages = [message for body in batches for message in self._decoder.decode(body)]
        except msgspec.MsgspecError as error:  # both ends are of one version: somebody else's message
            self.broken = str(error)
            messages = []
        if self.broken is not None:
            self.close()
        if messages:
            self.hear(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._unsent.clear()
        self.ended.set_result(None)

    def _send(self) -> None:
        if self._transport.is_closing():  # uvloop's raise then
            self._unsent.clear()
        while self._unsent and not self._is_full:
            for frame in frames(self._encode(self._next())):
                self._written += len(frame)
                self._transport.write(frame)

    def _next(self) -> Sequence[Message]:
        """The first messages that wait, as many as are about one piece."""
        batch: list[Message] = []
        size = 0
        while self._unsent and size < PIECE:
            message = self._unsent.popleft()
            batch.append(message)
            size += _weight(message)
        return batch


def _weight(message: Message) -> int:
    """About how long it is, if it is long (bytes)."""
    if isinstance(message, Run):
        return PIECE
    if isinstance(message, Finished) and isinstance(message.outcome, Succeeded):
        return len(message.outcome.result or b"") + sum(len(one.body) for one in message.outcome.follow_ups)
    return 0


def _nobody(messages: Sequence[object]) -> None:
    raise RuntimeError(f"{len(messages)} messages and nobody hears them")
