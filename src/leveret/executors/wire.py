"""What a worker and its child say to each other, and the frames it travels in.

A frame is four bytes of length (big-endian) and a msgpack array of messages.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import msgspec

from leveret.brokers import censor
from leveret.executors import Blocks, Finished, Job, Manifest, Progressed, Report, Started

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Import the application and get ready. ``url`` overrides the application's own."""

    app: str
    url: str | None
    concurrency: int

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


class NotLoaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The application can't be imported."""

    reason: str


ToChild: TypeAlias = Begin | Run | Cancel
ToWorker: TypeAlias = Ready | NotLoaded | Started | Progressed | Finished | Blocks
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
    length = int.from_bytes(connection.recv(_LENGTH, socket.MSG_WAITALL), "big")
    body = connection.recv(length, socket.MSG_WAITALL) if length else b""
    return msgspec.msgpack.decode(body, type=list[Begin])[0] if body and len(body) == length else None


class Pipe(Generic[M]):
    """One end of a socket pair: writes any messages, reads batches of type M."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reads: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(list[reads])

    def write(self, messages: Sequence[ToChild | ToWorker | Report]) -> None:
        """Queue a batch for sending. A peer that is gone shows when reading, never here."""
        self._writer.write(frame(messages, self._encode))

    async def read(self) -> list[M]:
        """The next batch; empty at the end: the other process is gone, or what it writes makes no sense any more."""
        try:
            length = int.from_bytes(await self._reader.readexactly(_LENGTH), "big")
            if length > _MOST_BYTES:
                raise ValueError(f"a frame of {length} bytes")  # noqa: TRY301 - treated as any other nonsense
            return self._decoder.decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return []
        except (msgspec.MsgspecError, ValueError) as error:
            log.error("a child process and its worker do not understand each other any more: %s", error)  # noqa: TRY400
            return []

    def close(self) -> None:
        self._writer.close()

    async def closed(self) -> None:
        """Wait until all that was written is sent, or the other process is gone."""
        with suppress(ConnectionError):
            await self._writer.wait_closed()
