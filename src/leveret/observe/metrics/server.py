"""A small HTTP/1.1 server for a few pages: GET alone, one request a connection, nothing that a client does can hold it.

It runs on the worker's own loop, so that an answer says that the loop turns.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.observe.listening import BACKLOG, accept, most_open

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping

    from leveret.observe.metrics import Address

log = logging.getLogger("leveret.metrics")

#: A longer request is refused (bytes).
_MOST_HEAD = 8_192
#: A client that has not asked, or not read its answer, by then is cut off (seconds).
_PATIENCE = 5.0
#: Connections at once; then the oldest that has not asked yet goes for a new one.
_MOST_OPEN = 64


class Answer(msgspec.Struct, frozen=True):
    """What a page says."""

    body: str
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = "text/plain; charset=utf-8"
    #: A further header line.
    header: str = ""


Page: TypeAlias = "Callable[[], Awaitable[Answer]]"


@asynccontextmanager
async def serving(address: Address, pages: Mapping[str, Page]) -> AsyncGenerator[tuple[str, int]]:
    """Serve the pages, by path, inside the block; gives the host and port. Raises ConfigurationError if it cannot."""
    server = _Server(pages)
    loop = asyncio.get_running_loop()
    try:
        # It only binds: what comes is accepted below.
        binding = await loop.create_server(asyncio.Protocol, address.host, address.port, start_serving=False)
        sockets = [bound.dup() for bound in binding.sockets]
        host, port = binding.sockets[0].getsockname()[:2]
        for bound in sockets:
            bound.listen(BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigurationError(
            f"metrics cannot be served on {address}: {reason}; choose another HOST:PORT"
        ) from error
    accepting = [loop.create_task(accept(bound, server.take, server.is_full, server.evict)) for bound in sockets]
    try:
        yield host, port
    finally:
        for task in accepting:
            task.cancel()
        await asyncio.gather(*accepting, return_exceptions=True)
        for bound in sockets:
            bound.close()
        binding.close()
        await server.close()


class _Server:
    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        #: The oldest first, and whether each has asked for something.
        self._open: dict[asyncio.Task[None], bool] = {}
        self._most = most_open(_MOST_OPEN)

    def is_full(self) -> bool:
        return len(self._open) >= self._most

    def evict(self) -> bool:
        """The oldest that has asked for nothing goes; else the oldest: the newest may be a probe."""
        idle = (task for task, has_asked in self._open.items() if not has_asked)
        oldest = next(idle, None) or next(iter(self._open), None)
        if oldest is None:
            return False
        del self._open[oldest]
        oldest.cancel()
        return True

    async def take(self, connection: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=_MOST_HEAD)
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader), connection
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self._open[loop.create_task(self.serve(reader, writer))] = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        this = asyncio.current_task()
        assert this is not None
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = _encoded(await self._answer(reader))
                if not writer.is_closing():  # uvloop's raise
                    writer.write(answer)
                    await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError):
            pass  # the client's to mind
        finally:
            writer.transport.abort()
            self._open.pop(this, None)

    async def close(self) -> None:
        tasks = list(self._open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        this = asyncio.current_task()
        if this in self._open:
            self._open[this] = True
        match head.partition(b"\r\n")[0].split(b" "):
            case [method, target, protocol] if protocol.startswith(b"HTTP/1."):
                pass
            case _:
                return _refusal(HTTPStatus.BAD_REQUEST)
        if method != b"GET":
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET")
        page = self._pages.get(target.partition(b"?")[0].decode("latin-1"))
        if page is None:
            return Answer(f"here are: {', '.join(self._pages)}\n", HTTPStatus.NOT_FOUND)
        try:
            return await page()
        except Exception:
            log.exception("a mistake in Leveret: %r cannot be shown", target)
            return _refusal(HTTPStatus.INTERNAL_SERVER_ERROR)


def _refusal(status: HTTPStatus, header: str = "") -> Answer:
    return Answer(f"{status.phrase}\n", status, header=header)


def _encoded(answer: Answer) -> bytes:
    body = answer.body.encode()
    lines = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *([answer.header] if answer.header else []),
    )
    return "\r\n".join((*lines, "", "")).encode() + body
