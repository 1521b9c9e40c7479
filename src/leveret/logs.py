"""Where a worker's log goes when its program has not decided that itself."""

from __future__ import annotations

import logging

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
#: What these say of a lost connection, Leveret says in one line of its own.
_DRIVERS = ("aiormq", "aio_pika")


def configure(level: str = "INFO") -> None:
    """Log to standard error, one line an event; a program that has set logging up itself is left alone."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=level, format=_FORMAT)
        for name in _DRIVERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
