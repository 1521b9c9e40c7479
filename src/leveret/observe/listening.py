"""Accepting connections so that clients which hold them, or are too many, lock nobody out and fill no log."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

log = logging.getLogger("leveret.listening")

#: Connections that the system keeps before they are accepted.
BACKLOG = 128
#: How long to wait when the process has no descriptor left (seconds).
_PAUSE = 0.05
#: The same is logged at most this often (seconds).
_QUIET = 10.0


def most_open(wanted: int) -> int:
    """How many connections at once: so many, but no more than half of the descriptors that the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return wanted if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft // 2))


async def accept(
    listening: socket.socket,
    take: Callable[[socket.socket], Awaitable[object]],
    is_full: Callable[[], bool],
    evict: Callable[[], bool],
) -> None:
    """Take what comes, until it is cancelled. The newest is let in: whoever probes, or reads a page, is one of these.

    ``evict``: end one that may go; False: there is none, and the new one is refused.

    asyncio's own servers log each of a hundred failures at once when there are no descriptors left, with a traceback.
    """
    loop = asyncio.get_running_loop()
    listening.settimeout(0.0)
    lacks = Counted(log, "connections could not be accepted: %s")
    while True:
        try:
            connection, _ = await loop.sock_accept(listening)
        except OSError as error:
            lacks.warn(error.strerror or str(error))
            evict()
            await asyncio.sleep(_PAUSE)
            continue
        if is_full() and not evict():
            connection.close()
        else:
            try:
                await take(connection)
            except OSError:  # it is gone already
                connection.close()
        await asyncio.sleep(0)  # others have a turn, and what was ended is closed


class Counted:
    """A warning that may be due thousands of times: one line in a while, with how many there were."""

    def __init__(self, logger: logging.Logger, message: str) -> None:
        self._log = logger
        self._message = message
        self._count = 0
        self._quiet_until = float("-inf")

    def warn(self, *values: object) -> None:
        self._count += 1
        if time.monotonic() < self._quiet_until:
            return
        count, self._count = self._count, 0
        self._quiet_until = time.monotonic() + _QUIET
        more = f" ({count - 1} more since the last such line)" if count > 1 else ""
        self._log.warning(self._message + "%s", *values, more)


class Repeated(logging.Filter):
    """Of lines that differ in nothing, one in a while."""

    def __init__(self) -> None:
        super().__init__()
        self._quiet_until: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        text = record.getMessage()
        self._quiet_until = {known: until for known, until in self._quiet_until.items() if until > now}
        if text in self._quiet_until:
            return False
        self._quiet_until[text] = now + _QUIET
        return True
