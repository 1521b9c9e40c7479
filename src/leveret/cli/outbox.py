"""``leveret relay`` and ``leveret outbox``: tasks that were stored with the transactions of a user's own database."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from leveret.cli.completing import complete_app
from leveret.cli.options import Below, loaded, local_time, print_json, url_option
from leveret.cli.terminal import show, table
from leveret.model.printable import in_line
from leveret.observe import Logging, quieten_connections
from leveret.observe.metrics import Address
from leveret.observe.metrics.server import Answer, serving
from leveret.outbox import BATCH, DIALECTS, MOST_TRIES, Relay, create_inbox, create_outbox, open_database

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from leveret.observe import Format
    from leveret.outbox.database import Database

T = TypeVar("T")


def _database_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--database",
        metavar="URL",
        envvar="LEVERET_DATABASE",
        required=True,
        help="Your database, as postgresql://user:password@host/name, mysql://... or sqlite:////whole/path.db.",
    )(function)


@click.group(cls=Below)
def command() -> None:
    """Tasks that were stored with transactions of your own database, until the relay has published them."""


@command.command("sql")
@click.argument("dialect", type=click.Choice(DIALECTS))
@click.option("--inbox", is_flag=True, help="The table of @app.task(inbox=...) instead.")
@click.option("--no-notify", is_flag=True, help="Without PostgreSQL's trigger that wakes the relay at each commit.")
def sql(dialect: str, inbox: bool, no_notify: bool) -> None:
    """Print the statements that make the outbox's table, for your migrations.

    \b
    Examples:
      leveret outbox sql postgresql | psql shop
      leveret outbox sql sqlite --inbox
    """
    statements = create_inbox(dialect) if inbox else create_outbox(dialect, notify=not no_notify)
    click.echo("".join(f"{statement};\n" for statement in statements), nl=False)


@command.command("list")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many rows.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, for programs.")
@_database_option
def list_(limit: int, as_json: bool, database: str) -> None:
    """List what waits for a relay: first what could not be published, with the reason.

    \b
    Examples:
      leveret outbox list --database postgresql://localhost/shop
    """
    rows = _ask(database, lambda found: found.rows(limit))
    if as_json:
        print_json(msgspec.json.format(msgspec.json.encode(rows), indent=2))
        return
    if not rows:
        click.echo("Nothing waits in the outbox.")
        return
    from rich.text import Text

    shown = table(("id", "task", "queue", "since", "tries", "state"), right=("tries",))
    for row in rows:
        state = f"failed: {in_line(row.error or '')}" if row.tries >= MOST_TRIES else in_line(row.error or "waits")
        shown.add_row(
            Text(in_line(row.id)),
            Text(in_line(row.task or "-")),
            Text(in_line(row.queue)),
            local_time(row.created),
            str(row.tries),
            Text(state, "red" if row.tries >= MOST_TRIES else ""),
        )
    show(shown)


@command.command("retry")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@_database_option
def retry(ids: tuple[str, ...], database: str) -> None:
    """Have the relay try rows again that could not be published; without an ID all of them.

    \b
    Examples:
      leveret outbox retry --database postgresql://localhost/shop
    """
    count = _ask(database, lambda found: found.retry(ids))
    click.echo(f"{count} rows are tried again")


def _ask(url: str, question: Callable[[Database], Awaitable[T]]) -> T:
    async def run() -> T:
        database = open_database(url)
        try:
            await database.check()
            return await question(database)
        finally:
            await database.close()

    return asyncio.run(run())


@click.command("relay")
@click.argument("app", metavar="MODULE:APP", envvar="LEVERET_APP", shell_complete=complete_app)
@_database_option
@click.option("--poll", is_flag=True, help="Do not LISTEN on PostgreSQL: behind pgbouncer in transaction mode.")
@click.option("--batch", type=click.IntRange(1, 10_000), default=BATCH, show_default=True, help="Rows at once.")
@click.option(
    "--metrics", metavar="HOST:PORT", help="Serve /metrics for Prometheus there: rows, failed, age, published."
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--until-eof", is_flag=True, hidden=True, help="End when the standard input ends: a worker's.")
@url_option
def relay(
    app: str,
    database: str,
    poll: bool,
    batch: int,
    metrics: str | None,
    log_format: Format,
    until_eof: bool,
    url: str | None,
) -> None:
    """Publish the tasks of committed transactions, until SIGTERM or Ctrl-C. Any number of relays may run.

    A task is deleted from the outbox when the broker has confirmed it. One that cannot be published is left alone after
    five tries: `leveret outbox list` says why.

    \b
    Examples:
      leveret relay tasks:app --database postgresql://localhost/shop
      LEVERET_DATABASE=mysql://root@localhost/shop leveret relay tasks:app
    """
    Logging(None, log_format).set_up()
    quieten_connections()
    address = None if metrics is None else Address.parse(metrics)

    async def run() -> None:
        found = loaded(app, url)
        opened = open_database(database)
        running = Relay(opened, found.client, batch=batch, poll=poll)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(opened.close)
            stack.push_async_callback(found.close)
            stack.enter_context(_stopping(running, until_eof=until_eof))
            if address is not None:
                await stack.enter_async_context(serving(address, {"/metrics": lambda: _metrics(database, running)}))
            click.echo(f"relaying from {opened.place}", err=True)
            await running.run()

    asyncio.run(run())


@contextmanager
def _stopping(running: Relay, *, until_eof: bool) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, running.stop)
    if until_eof:
        loop.add_reader(sys.stdin.fileno(), running.stop)
    try:
        yield
    finally:
        if until_eof:
            loop.remove_reader(sys.stdin.fileno())


async def _metrics(url: str, running: Relay) -> Answer:
    """By a connection of its own: the relay's may be in a transaction."""
    database = open_database(url)
    try:
        gauges = await database.gauges()
    finally:
        await database.close()
    named = (
        ("leveret_outbox_rows", "gauge", "Tasks that wait in the outbox.", gauges.rows),
        ("leveret_outbox_failed", "gauge", "Those that are not tried any more.", gauges.failed),
        ("leveret_outbox_oldest_seconds", "gauge", "The age of the oldest that is tried.", gauges.oldest),
        ("leveret_outbox_published_total", "counter", "Published by this relay.", running.published),
    )
    return Answer(
        "".join(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in named)
    )
