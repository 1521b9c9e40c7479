"""Serves a dashboard by itself, until it is told to stop."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

import uvicorn

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.dashboard.pages import Dashboard

#: The names of this machine for itself: with these alone a page elsewhere cannot ask in a reader's name.
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
#: Streams end at once when it stops; anything else gets so long (seconds).
_GRACE = 3


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
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    with listening:
        shown = f"[{host}]" if family is socket.AF_INET6 else host
        server = _Server(dashboard, lambda: ready(f"http://{shown}:{listening.getsockname()[1]}/"))
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says when it answers, and has the streams end before it waits for them."""

    def __init__(self, dashboard: Dashboard, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                dashboard,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE,
                lifespan="on",
            )
        )
        self._dashboard = dashboard
        self._ready = ready

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets) if sockets else None)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: Sequence[socket.socket] | None = None) -> None:
        self._dashboard.close()
        await super().shutdown(list(sockets) if sockets else None)
