"""``leveret worker --metrics HOST:PORT``: what a worker tells Prometheus, and the probes of whoever runs it.

`prometheus` alone imports prometheus_client, when it is asked for; `server` is the HTTP server.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

import msgspec

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.model import Envelope, LimitUse, QueueStats
    from leveret.observe.metrics.prometheus import Exporter

_MOST_PORT = 65_535


class Condition(msgspec.Struct, frozen=True):
    """How a worker is at a moment."""

    #: Whether tasks come to it: not while it connects, or stops.
    consuming: bool
    running: int
    #: Deliveries that it holds and has not begun.
    waiting: int
    #: How often the connection that brings its tasks was lost.
    losses: int


class Source(Protocol):
    """What is asked of a worker when it is scraped; `leveret.worker.Worker` is one."""

    def condition(self) -> Condition: ...
    async def stats(self) -> Sequence[QueueStats]: ...
    async def limits(self) -> Sequence[LimitUse]: ...
    def tasks(self) -> Sequence[tuple[str, str]]: ...
    def registered(self, envelope: Envelope, /) -> str | None: ...


class Address(msgspec.Struct, frozen=True):
    """Where to listen. Port 0: any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ConfigurationError for what is not HOST:PORT."""
        host, _, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if not host or not (port.isascii() and port.isdigit()) or int(port) > _MOST_PORT:
            raise ConfigurationError(
                f"the address for metrics is {text!r}; it must be HOST:PORT with a port from 0 to {_MOST_PORT}, as in "
                "127.0.0.1:9090, [::1]:9090, or 0.0.0.0:9090 for all interfaces"
            )
        return cls(host, int(port))


def exporting(address: str) -> Exporter:
    """The exporter of a worker. Raises ConfigurationError for a bad address, and if prometheus_client is missing."""
    where = Address.parse(address)
    try:
        prometheus = importlib.import_module("leveret.observe.metrics.prometheus")
    except ModuleNotFoundError as error:
        if error.name != "prometheus_client":
            raise
        raise ConfigurationError(
            "metrics need the package prometheus-client: pip install 'leveret[prometheus]'"
        ) from error
    exporter: Exporter = prometheus.Exporter(where)
    return exporter
