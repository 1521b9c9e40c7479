"""Serves a dashboard by itself, until it is told to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.h11_impl import H11Protocol

from leveret.errors import ConfigurationError
from leveret.observe import BACKLOG, Repeated, accept, most_open

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.dashboard.application import Dashboard

#: The names of this machine for itself: with these alone a page elsewhere cannot ask in a reader's name.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
#: Streams end at once when it stops; anything else gets so long (seconds).
_GRACE = 3
#: Connections at once; the one that is idle for the longest goes for a new one. A browser holds up to six.
_MOST_OPEN = 100
#: A client may take so long to send a request, or to read anything of an answer; how often that is looked at (seconds).
_PATIENCE = 10.0
_STEP = 1.0
#: A request's line and headers (bytes).
_LARGEST_HEAD = 16_384


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(dashboard: Dashboard, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Listen and answer until SIGINT or SIGTERM. ``ready`` is told the address. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    with listening:
        shown = f"[{host}]" if family is socket.AF_INET6 else host
        server = _Server(dashboard, lambda: ready(f"http://{shown}:{listening.getsockname()[1]}/"))
        server.run(sockets=[listening])


class _Connection(H11Protocol):
    """One that knows since when nothing was asked of it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.idle_since = time.monotonic()
        #: What its client had not read, and since when it is no less.
        self.unread = 0
        self.unread_since = self.idle_since

    @property
    def is_idle(self) -> bool:
        """Whether it waits for its client: for a request, or for the rest of one."""
        is_new = self.cycle is None  # type: ignore[redundant-expr, unused-ignore]
        return is_new or self.cycle.response_complete or self.cycle.more_body

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        super().on_response_complete()

    def check(self, now: float) -> None:
        """Cut it off when its client has kept it waiting for too long."""
        unread = self.transport.get_write_buffer_size()
        if unread == 0 or unread < self.unread:
            self.unread_since = now
        self.unread = unread
        if (self.is_idle and now - self.idle_since > _PATIENCE) or now - self.unread_since > _PATIENCE:
            self.transport.abort()


class _Server(uvicorn.Server):
    """Says when it answers, lets no slow client hold it, and has the streams end before it waits for them."""

    def __init__(self, dashboard: Dashboard, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                dashboard,
                http=_Connection,
                ws="none",
                h11_max_incomplete_event_size=_LARGEST_HEAD,
                log_level="warning",
                # Our own: its lines would hold what clients send.
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE,
                lifespan="on",
            )
        )
        self._dashboard = dashboard
        self._ready = ready
        self._most = most_open(_MOST_OPEN)
        self._tasks: list[asyncio.Task[None]] = []
        logging.getLogger("uvicorn.error").addFilter(Repeated())

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """In place of uvicorn's, whose servers accept whatever comes."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        self.servers = []
        loop = asyncio.get_running_loop()

        def connection() -> _Connection:
            return _Connection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        async def take(accepted: socket.socket) -> None:
            await loop.connect_accepted_socket(connection, accepted)

        for one in sockets or ():
            accepting = accept(one, take, lambda: len(self.server_state.connections) >= self._most, self._evict)
            self._tasks.append(loop.create_task(accepting))
        self._tasks.append(loop.create_task(self._watch()))
        self.started = True
        self._ready()

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._dashboard.close()
        await super().shutdown(list(sockets) if sockets else None)

    def _connections(self) -> list[_Connection]:
        return [one for one in self.server_state.connections if isinstance(one, _Connection)]

    def _evict(self) -> bool:
        oldest = min((one for one in self._connections() if one.is_idle), key=lambda one: one.idle_since, default=None)
        if oldest is None:
            return False
        self.server_state.connections.discard(oldest)  # it is closed in a moment
        oldest.transport.abort()
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_STEP)
            now = time.monotonic()
            for connection in self._connections():
                connection.check(now)
