"""A thread with an event loop, for code that has none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

#: How long closing the connection may take (seconds).
_CLOSE_TIMEOUT = 5.0


class SyncBridge:
    """A thread with a loop of its own, started at its first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        #: What other threads wait for now.
        self._waited_for: set[concurrent.futures.Future[Any]] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """None: it was not used yet."""
        opened = self._open
        return None if opened is None else opened[0]

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._opened())
            self._waited_for.add(future)
        future.add_done_callback(self._waited_for.discard)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, closer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with self._lock:
            opened, self._open = self._open, None
            waited_for = set(self._waited_for)
        if opened is None:
            return
        loop, thread = opened
        for late in concurrent.futures.wait(waited_for, timeout=_CLOSE_TIMEOUT).not_done:
            late.cancel()
        asyncio.run_coroutine_threadsafe(closer(), loop).result(_CLOSE_TIMEOUT)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _opened(self) -> asyncio.AbstractEventLoop:
        if self._open is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="leveret-door", daemon=True)
            thread.start()
            self._open = loop, thread
        return self._open[0]
