"""What several commands take: the broker's URL, and an application to get it from."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import click

from leveret.app import load_app
from leveret.brokers import Broker, connect, resolve_url
from leveret.logs import quieten_connections
from leveret.visible import in_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: How long a question to the broker may take from the command line (seconds).
_TIMEOUT = 10.0


def url_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--url", metavar="URL", help="The broker's, instead of the application's or $LEVERET_URL.")(
        function
    )


def print_json(encoded: bytes) -> None:
    """What is JSON, for programs; a terminal that shows it obeys nothing of it."""
    # Not through the stream's own encoding, which may be another than JSON's.
    click.echo(in_json(encoded.decode()).encode())


def local_time(seconds: float) -> str:
    """A Unix time in the reader's zone; in UTC where that zone has no such date."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    try:
        return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError):
        return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def broker_and_queues(reference: str | None, url: str | None) -> tuple[Broker, Sequence[str]]:
    """The broker that was asked for, and the queues of the application if one was named."""
    quieten_connections()
    if reference is None:
        return connect(resolve_url(url), timeout=_TIMEOUT), ()
    app = load_app(reference)
    return connect(url or app.url, timeout=_TIMEOUT), [queue.name for queue in app.queues]
