"""How a URL becomes a broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.brokers.base import DEFAULT_TIMEOUT
from leveret.brokers.urls import censor
from leveret.errors import ConfigurationError
from leveret.model import KEEP
from leveret.model.arguments import seconds

if TYPE_CHECKING:
    from datetime import timedelta

    from leveret.brokers.base import Broker


def connect(url: str, *, timeout: float | timedelta = DEFAULT_TIMEOUT, keep: float | timedelta = KEEP) -> Broker:
    """The broker for a URL: ``sqlite:///file.db``, ``amqp://...``, ``amqps://...`` or ``memory://``.

    ``timeout``: how long a publish may take; ``keep``: how long results are kept (seconds, or a timedelta).
    Nothing is opened before its first use. Raises ConfigurationError for a URL that no broker knows.
    """
    timeout, keep = seconds("timeout", timeout, above_zero=True), seconds("keep", keep, above_zero=True)
    scheme = url.partition(":")[0].lower()
    if scheme == "sqlite":
        from leveret.brokers.sqlite import SQLiteBroker

        return SQLiteBroker.from_url(url, timeout=timeout, keep=keep)
    if scheme in ("amqp", "amqps"):
        from leveret.brokers.rabbitmq import RabbitMQBroker

        return RabbitMQBroker(url, timeout=timeout, keep=keep)
    if scheme == "memory":
        from leveret.brokers.memory import MemoryBroker

        if url.partition(":")[2] not in ("", "//"):
            raise ConfigurationError(
                f"{censor(url)!r}: the memory broker takes neither a name nor parameters; write memory://"
            )
        return MemoryBroker(keep=keep)
    raise ConfigurationError(
        f"{censor(url)!r} is not a broker's URL: use sqlite:///file.db, amqp://user:password@host/vhost or memory://"
    )
