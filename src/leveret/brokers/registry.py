"""How a URL becomes a broker: its scheme says which."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from leveret.brokers.base import DEFAULT_TIMEOUT
from leveret.brokers.urls import censor
from leveret.errors import ConfigurationError
from leveret.model import KEEP
from leveret.model.arguments import seconds
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from datetime import timedelta

    from leveret.brokers.base import Broker

#: Where another package registers a broker: the entry point's name is the URL's scheme, in lower case.
ENTRY_POINTS = "leveret.brokers"


class Opener(Protocol):
    """Makes the broker for a URL, and opens nothing yet. Raises ConfigurationError for a URL that it cannot use."""

    def __call__(self, url: str, /, *, timeout: float, keep: float) -> Broker:
        """Make the broker.

        Args:
            url: The broker's URL.
            timeout: How long a publish may take (seconds).
            keep: How long results are kept (seconds).

        Returns:
            The broker, which has opened nothing yet.

        Raises:
            ConfigurationError: The URL cannot be used.
        """


def _sqlite(url: str, *, timeout: float, keep: float) -> Broker:
    from leveret.brokers.sqlite import SQLiteBroker

    return SQLiteBroker.from_url(url, timeout=timeout, keep=keep)


def _rabbitmq(url: str, *, timeout: float, keep: float) -> Broker:
    from leveret.brokers.rabbitmq import RabbitMQBroker

    return RabbitMQBroker(url, timeout=timeout, keep=keep)


def _memory(url: str, *, timeout: float, keep: float) -> Broker:
    from leveret.brokers.memory import MemoryBroker

    del timeout  # nothing is waited for
    return MemoryBroker.from_url(url, keep=keep)


#: Leveret's own, by scheme. Each imports its broker, and that one's driver, when it is called.
_OWN: dict[str, Opener] = {"sqlite": _sqlite, "amqp": _rabbitmq, "amqps": _rabbitmq, "memory": _memory}


def connect(url: str, *, timeout: float | timedelta = DEFAULT_TIMEOUT, keep: float | timedelta = KEEP) -> Broker:
    """Make the broker for a URL. Nothing is opened before its first use.

    Args:
        url: ``sqlite:///file.db``, ``amqp://...``, ``amqps://...``, ``memory://`` or another package's.
        timeout: How long a publish may take (seconds, or a timedelta), more than 0.
        keep: How long results are kept (seconds, or a timedelta), more than 0.

    Returns:
        The broker.

    Raises:
        ConfigurationError: No broker knows the URL, or a duration is none.
    """
    timeout, keep = seconds("timeout", timeout, above_zero=True), seconds("keep", keep, above_zero=True)
    scheme = url.partition(":")[0].lower()
    opener = _OWN.get(scheme) or _registered(scheme)
    if opener is None:
        known = schemes()
        raise ConfigurationError(
            f"{censor(url)!r} is not a broker's URL: use sqlite:///file.db, amqp://user:password@host/vhost or "
            f"memory://; the schemes known here are {', '.join(known)}{did_you_mean(scheme, known)}"
        )
    return opener(url, timeout=timeout, keep=keep)


def schemes() -> list[str]:
    """The schemes of all brokers: Leveret's own and those that installed packages register."""
    return sorted(_OWN.keys() | {entry.name for entry in entry_points(group=ENTRY_POINTS)})


def _registered(scheme: str) -> Opener | None:
    """The broker that another package registers for a scheme, if there is one."""
    found = tuple(entry_points(group=ENTRY_POINTS, name=scheme))
    if not found:
        return None
    packages = " and ".join(sorted(str(entry.dist and entry.dist.name) for entry in found))
    if len(found) > 1:
        raise ConfigurationError(f"{packages} both register a broker for {scheme}: URLs; uninstall one of them")
    try:
        opener: Opener = found[0].load()
    except Exception as error:
        raise ConfigurationError(
            f"the broker for {scheme}: URLs, {found[0].value} of {packages}, cannot be imported: {error}"
        ) from error
    return opener
