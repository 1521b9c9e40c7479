"""What a worker and its child say to each other, and the frames it travels in.

A frame is four bytes of length (big-endian) and a msgpack array of messages.
"""

from __future__ import annotations

import asyncio
import logging
from socket import MSG_WAITALL
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar, cast

import msgspec

from leveret.brokers import censor
from leveret.executors import Blocks, Finished, Job, Manifest, Progressed, Report, Started
from leveret.logs import Logging
from leveret.loops import Loop

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Import the application and get ready. ``url`` overrides the application's own."""

    app: str
    url: str | None
    concurrency: int
    #: Where its logs go, unless the application decides that; None: the application alone does.
    logs: Logging | None = None
    loop: Loop = "auto"

    def __repr__(self) -> str:
        return f"Begin({self.app!r}, {censor(self.url or '')!r}, {self.concurrency})"


class Run(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Run a job when a slot is free."""

    job: Job


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Have jobs not run, or end if they do."""

    keys: list[int]


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The application is imported."""

    manifest: Manifest
    #: Its source files, as far as they are imported now.
    sources: list[str]


class NotLoaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The application can't be imported."""

    reason: str


class Turns(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The event loop turns again, after `Blocks`."""


ToChild: TypeAlias = Begin | Run | Cancel
ToWorker: TypeAlias = Ready | NotLoaded | Started | Progressed | Finished | Blocks | Turns
M = TypeVar("M")

_LENGTH = 4
#: No batch is longer; a larger number is something else that was written into the socket, by a task perhaps.
_MOST_BYTES = 1 << 30

log = logging.getLogger("leveret.executors")


def frame(
    messages: Sequence[ToChild | ToWorker | Report], encode: Callable[[Any], bytes] = msgspec.msgpack.encode
) -> bytes:
    """The bytes of one batch."""
    body = encode(messages)
    return len(body).to_bytes(_LENGTH, "big") + body


def read_begin(connection: socket.socket) -> Begin | None:
    """The first message to a child, read before it has an event loop; None: its worker is gone."""
    length = int.from_bytes(connection.recv(_LENGTH, MSG_WAITALL), "big")
    body = connection.recv(length, MSG_WAITALL) if length else b""
    return msgspec.msgpack.decode(body, type=list[Begin])[0] if body and len(body) == length else None


class Pipe(asyncio.Protocol, Generic[M]):
    """One end of a socket pair: writes any messages, and hands on those of type M, all at once that a read brought."""

    def __init__(self, reads: Any) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[reads])
        self._data = b""
        #: Called with what comes.
        self.hear: Callable[[list[M]], None] = _nobody
        #: Done when nothing comes any more: the other process is gone, or what it writes makes no sense any more.
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def open(cls, end: socket.socket, reads: Any) -> Self:
        """A pipe over a socket, which is its own from now on."""
        _, pipe = await asyncio.get_running_loop().create_connection(lambda: cls(reads), sock=end)
        return pipe

    def write(self, messages: Sequence[ToChild | ToWorker | Report]) -> None:
        """Queue a batch for sending. A peer that is gone shows by the end, never here."""
        if not self._transport.is_closing():  # uvloop's raise
            self._transport.write(frame(messages, self._encode))

    async def first(self) -> list[M]:
        """What comes first; empty when that is the end."""
        came: asyncio.Future[list[M]] = asyncio.get_running_loop().create_future()
        self.hear = came.set_result
        ends: list[asyncio.Future[Any]] = [came, self.ended]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        return came.result() if came.done() else []

    def close(self) -> None:
        """Hear nothing any more, and end when all that was written is sent."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # By what it is for: uvloop's transports are no subclasses.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._decode(self._data + data if self._data else data)
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("a child process and its worker do not understand each other any more: %s", error)  # noqa: TRY400
            self.close()
            return
        if messages:
            self.hear(messages)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self.ended.set_result(None)

    def _decode(self, data: bytes) -> list[M]:
        """The messages of all frames that are whole; the rest is kept."""
        messages: list[M] = []
        at = 0
        while at + _LENGTH <= len(data):
            length = int.from_bytes(data[at : at + _LENGTH], "big")
            if length > _MOST_BYTES:
                raise ValueError(f"a frame of {length} bytes")
            end = at + _LENGTH + length
            if end > len(data):
                break
            messages += self._decoder.decode(data[at + _LENGTH : end])
            at = end
        self._data = data[at:]
        return messages


def _nobody(messages: Sequence[object]) -> None:
    raise RuntimeError(f"{len(messages)} messages and nobody hears them")
