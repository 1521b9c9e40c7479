"""Telling the log and the listeners what happened."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from leveret.observe import write_log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.observe import Event, Listener

log = logging.getLogger("leveret.worker")


class Listeners:
    """The log and whoever else listens to a worker. One that fails is logged, and harms nothing."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._all = (write_log, *listeners)
        #: Whether anybody but the log listens.
        self.are_given = bool(listeners)

    @property
    def hear_successes(self) -> bool:
        """Whether anybody wants to know of a task that is done: nearly all events are such."""
        return self.are_given or log.isEnabledFor(logging.INFO)

    def notify(self, event: Event) -> None:
        for listener in self._all:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", type(event).__name__)
