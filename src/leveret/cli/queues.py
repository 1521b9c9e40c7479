"""``leveret queues``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click
import msgspec

from leveret.cli.options import broker_and_queues, url_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker
    from leveret.model import QueueStats


@click.command()
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option("-q", "--queue", "queues", multiple=True, help="A queue to show; again for more.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, for programs.")
@url_option
def command(app: str | None, queues: tuple[str, ...], as_json: bool, url: str | None) -> None:
    """Show each queue's tasks: ready, running (RabbitMQ: unacknowledged), delayed, dead; and its consumers.

    SQLite lists all queues of the file. RabbitMQ cannot list queues without a plugin: it shows those that are named,
    the application's, and those that workers are consuming now. It needs no plugin for that.

    \b
    Examples:
      leveret queues
      leveret queues tasks:app --json
      leveret queues -q task_queue --url amqp://guest:guest@localhost/
    """
    broker, known = broker_and_queues(app, url)
    names = list(dict.fromkeys([*queues, *known]))
    stats = asyncio.run(_ask(broker, names))
    if queues:
        stats = [one for one in stats if one.name in queues]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(stats), indent=2).decode())
    elif stats:
        _show(stats)
    else:
        click.echo("No queues. On RabbitMQ, name them with -q or with MODULE:APP.")


async def _ask(broker: Broker, names: Sequence[str]) -> Sequence[QueueStats]:
    try:
        return await broker.stats(names)
    finally:
        await broker.close()


def _show(stats: Sequence[QueueStats]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    for heading in ("ready", "running", "delayed", "dead", "consumers"):
        table.add_column(heading, justify="right")
    for one in stats:
        running = f"{one.running}+?" if one.silent_consumers else str(one.running)
        dead = f"[red]{one.dead}[/red]" if one.dead else "0"
        table.add_row(_escape(one.name), str(one.ready), running, str(one.delayed), dead, str(one.consumers))
    Console().print(table)
    silent = sum(one.silent_consumers for one in stats)
    if silent:
        click.echo(f"+?: {silent} consumers are not Leveret's or did not answer; what they run is not counted.")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
