"""The hosts of a URL: which is tried first, and when the next one is tried beside it. See docs/adr/0027."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import deque
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from leveret.brokers.rabbitmq.amqp import tls
from leveret.brokers.rabbitmq.amqp.parameters import read_parameters
from leveret.errors import BrokerError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

T = TypeVar("T")

#: How long a host, or an address of one, may take before the next is tried beside it: at most so long, and all together
#: in this part of the caller's time (seconds).
_BESIDE = 1.0
_SHARE = 0.25
_LEAST_BESIDE = 0.02
#: How long an open connection may take to show that it lives: a part of the caller's time, within these (seconds).
_PATIENCE = 0.5, 3.0


class Hosts:
    """What all connections of one broker know about its hosts. ``timeout``: what its callers wait for (seconds).

    Raises ConfigurationError for a URL that cannot be right.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        self.urls = hosts(url)
        self.parameters = read_parameters(url)
        self.is_unverified = tls.is_unverified(self.urls[0])
        #: Until the next host is tried beside the one before (seconds).
        self.beside = max(_LEAST_BESIDE, min(_BESIDE, timeout * _SHARE / len(self.urls)))
        self.patience = min(max(_PATIENCE[0], timeout * _SHARE), _PATIENCE[1])
        #: When each was found wanting, by a clock that only goes forward.
        self._failed_at: dict[str, float] = {}
        self._last: str | None = None

    @property
    def have_a_choice(self) -> bool:
        return len(self.urls) > 1

    def with_heartbeat(self, seconds: int) -> Hosts:
        """The same hosts, for a connection whose end the server shall notice so soon, unless its URL says sooner."""
        hosts = copy(self)
        if not self.parameters.heartbeat or self.parameters.heartbeat > seconds:
            hosts.parameters = msgspec.structs.replace(self.parameters, heartbeat=seconds)
        return hosts

    def in_order(self) -> Sequence[str]:
        """The one that was connected to last, then those that have not failed, or not for the longest time."""
        return sorted(self.urls, key=lambda url: (url != self._last, self._failed_at.get(url, 0.0)))

    def succeeded(self, url: str) -> None:
        self._last = url
        self._failed_at.pop(url, None)

    def failed(self, url: str) -> None:
        """It does not answer, or it closed a connection."""
        self._failed_at[url] = time.monotonic()
        if self._last == url:
            self._last = None


async def addresses(url: str) -> Sequence[str]:
    """Those that the host's name has now. Raises OSError."""
    name = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))
    return [name]


async def first(
    attempts: Sequence[Callable[[], Coroutine[Any, Any, T]]], beside: float, let_go: Callable[[T], None]
) -> T | list[BrokerError]:
    """What the first attempt that succeeds gives, or why each failed, in their order.

    Each begins when the one before has failed, or has taken ``beside`` seconds. ``let_go``: of what comes too late.
    """
    waiting, running = deque(enumerate(attempts)), dict[asyncio.Task[T], int]()
    failures: dict[int, BrokerError] = {}
    try:
        while waiting or running:
            if waiting:
                number, attempt = waiting.popleft()
                running[asyncio.get_running_loop().create_task(attempt())] = number
            done, _ = await asyncio.wait(
                running, timeout=beside if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                try:
                    result = task.result()
                except BrokerError as error:
                    failures[running.pop(task)] = error
                else:
                    del running[task]
                    return result
    finally:
        for late in running:
            late.add_done_callback(partial(_let_go, let_go))
            late.cancel()
    return [failures[number] for number in sorted(failures)]


def _let_go(let_go: Callable[[T], None], late: asyncio.Task[T]) -> None:
    if not late.cancelled() and late.exception() is None:
        let_go(late.result())


def hosts(url: str) -> list[str]:
    """One URL a host of ``amqp://user:password@host1,host2:5673/vhost?heartbeat=20``. Raises ConfigurationError."""
    try:
        # By hand as far as the list goes: a strict parser takes several addresses in brackets for none.
        scheme, _, rest = url.partition("://")
        end = min((index for mark in "/?#" if (index := rest.find(mark)) >= 0), default=len(rest))
        credentials, at, names = rest[:end].rpartition("@")
        urls = [f"{scheme}://{credentials}{at}{host}{rest[end:]}" for host in names.split(",")]
        for one in map(urlsplit, urls):
            if not one.hostname or one.port == 0:
                raise ValueError(one.netloc)  # noqa: TRY301 - the same message as for a port that is no number
    except ValueError:
        raise ConfigurationError(
            "the RabbitMQ URL cannot be read: write amqp://user:password@host:5672/vhost, with special characters "
            "percent-encoded"
        ) from None
    return urls
