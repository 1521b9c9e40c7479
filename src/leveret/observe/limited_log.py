"""Log lines that may come by the thousand: the first of each kind at once, then how many more there were."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import logging
    from collections.abc import Mapping

#: How long lines of a kind are counted, and then told in one (seconds).
EVERY = 10.0


class _Kind:
    """Lines of one text, since when they are counted."""

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.count = 0
        self.last: tuple[Any, ...] = ()


class LimitedLog:
    """Warnings of one logger. A kind is a text with its placeholders filled differently. For all threads and loops."""

    def __init__(self, log: logging.Logger, every: float = EVERY) -> None:
        self._log = log
        self._every = every
        self._kinds: dict[str, _Kind] = {}
        self._lock = threading.Lock()

    def warning(self, text: str, *arguments: object, extra: Mapping[str, object] | None = None) -> None:
        """Log it, or count it if one of its kind was logged just now."""
        now = time.monotonic()
        with self._lock:
            kind = self._kinds.get(text)
            is_new = kind is None or now - kind.began_at >= self._every
            if kind is not None and not is_new:
                kind.count += 1
                kind.last = arguments
                return
            self._kinds[text] = _Kind(now)
        if kind is not None:
            self._tell(text, kind)
        self._log.warning(text, *arguments, extra=extra)
        try:
            asyncio.get_running_loop().call_later(self._every, self._end, text)
        except RuntimeError:  # the next line, or the end of the program, tells the count
            return

    def flush(self) -> None:
        """Tell what is counted: its owner ends."""
        with self._lock:
            kinds, self._kinds = self._kinds, {}
        for text, kind in kinds.items():
            self._tell(text, kind)

    def _end(self, text: str) -> None:
        with self._lock:
            kind = self._kinds.get(text)
            if kind is None or time.monotonic() - kind.began_at < self._every * 0.9:
                return  # told by a later line, whose time is not over
            if kind.count:
                self._kinds[text] = _Kind(time.monotonic())
            else:
                del self._kinds[text]
        if kind.count:
            self._tell(text, kind)
            asyncio.get_running_loop().call_later(self._every, self._end, text)

    def _tell(self, text: str, kind: _Kind) -> None:
        if kind.count:
            self._log.warning(f"%d more in %.0f s: {text}", kind.count, time.monotonic() - kind.began_at, *kind.last)
