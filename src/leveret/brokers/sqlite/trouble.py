"""What goes wrong for a while: said when it begins, and when it has ended, however often it is tried meanwhile."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.wakeup import Listener, WakeUps

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret.brokers.sqlite.writer import Writer

log = logging.getLogger("leveret.sqlite")


class Trouble:
    """``what``: what cannot be done, as the log says it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = ""

    @property
    def lasts(self) -> bool:
        return bool(self._said)

    def begin(self, error: Exception) -> None:
        """It failed. Said once for each reason."""
        text = str(error)
        if text != self._said:
            log.warning("%s, trying again until it works: %s", self._what, text)
            self._said = text or type(error).__name__

    def end(self) -> None:
        """It works."""
        if self._said:
            log.warning("it works again, after: %s", self._what)
            self._said = ""


def listening(bells: WakeUps, rung: Callable[[], object], writer: Writer) -> Listener:
    """A bell of one's own. Raises StoreError if this user cannot have one."""
    try:
        return Listener(bells, rung)
    except OSError as error:
        raise translate(error, writer.path) from error
