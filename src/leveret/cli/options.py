"""What several commands take: the broker's URL, an application to get it from, and a question to ask there."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from leveret.brokers import Broker, absolute, connect, location
from leveret.cli.completing import complete_app
from leveret.client import load_app, resolve_url
from leveret.errors import LimitNotFound, QueueNotFound, ScheduleNotFound, TaskNotFound
from leveret.model.printable import in_json
from leveret.model.suggest import did_you_mean
from leveret.observe import quieten_connections

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from leveret.client import App

T = TypeVar("T")

#: How long a question to the broker may take from the command line (seconds).
TIMEOUT = 10.0


class Below(click.Group):
    """A group that guesses which of its commands was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-") and not ctx.resilient_parsing:
            hint = did_you_mean(args[0], known) or f"; there are: {', '.join(known)}"
            ctx.fail(f"No such command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


class Listing(Below):
    """It lists if no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_bare = not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names)
        return super().parse_args(ctx, ["list", *args] if is_bare and not ctx.resilient_parsing else args)


class Target(msgspec.Struct, frozen=True):
    """What a command is about."""

    broker: Broker
    #: The application's queues, if one was named.
    queues: tuple[str, ...]
    #: The file or the server, for people.
    place: str


def url_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--url",
        metavar="URL",
        # Made whole at once: importing an application may change the directory.
        callback=lambda _context, _option, url: url and absolute(url),
        help="The broker's, instead of the application's or $LEVERET_URL.",
    )(function)


def app_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--app",
        metavar="MODULE:APP",
        envvar="LEVERET_APP",
        shell_complete=complete_app,
        help="Take the broker's URL, and the queues, from this application.",
    )(function)


def loaded(reference: str, url: str | None) -> App:
    app = load_app(reference)
    if url is not None:
        app.client.connect_to(url)
    return app


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


def target(reference: str | None, url: str | None) -> Target:
    """The broker that was asked for."""
    quieten_connections()
    if reference is None:
        whole = resolve_url(url)
        return Target(connect(whole, timeout=TIMEOUT), (), location(whole))
    app = loaded(reference, url)
    return Target(connect(app.url, timeout=TIMEOUT), tuple(queue.name for queue in app.queues), location(app.url))


def ask(found: Target, question: Callable[[Broker], Awaitable[T]]) -> T:
    """The answer; an error about what is not there says where it was looked for."""

    async def run() -> T:
        try:
            return await question(found.broker)
        except (LimitNotFound, QueueNotFound, ScheduleNotFound, TaskNotFound) as error:
            raise within(error, found.place) from error
        finally:
            await found.broker.close()

    return asyncio.run(run())


def within(error: Exception, place: str) -> Exception:
    """The error, with where it was looked."""
    return error if place in str(error) else type(error)(f"{error} (looked in {place})")


async def require(broker: Broker, queue: str) -> None:
    """Raises QueueNotFound, with what was perhaps meant."""
    known = [one.name for one in await broker.queues.stats([queue])]
    if queue not in known:
        raise unknown_queue(queue, known)


def unknown_queue(queue: str, known: Iterable[str]) -> QueueNotFound:
    hint = did_you_mean(queue, known) or "; leveret queues shows those that do"
    return QueueNotFound(f"queue {queue!r} does not exist{hint}")
