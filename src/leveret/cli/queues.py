"""``leveret queues``, and ``leveret queues pause`` and ``resume``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

import click
import msgspec

from leveret.cli.options import broker_and_queues, url_option
from leveret.visible import in_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from leveret.brokers import Broker
    from leveret.model import QueueStats


def _app_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--app", metavar="MODULE:APP", help="Take the broker's URL from this application.")(function)


@click.command()
@click.argument("queues", metavar="QUEUE...", nargs=-1, required=True)
@_app_option
@url_option
def pause(queues: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have all workers start nothing more of these queues, until they are resumed.

    What runs is finished; what a worker has fetched and not begun goes back. Tasks can still be enqueued. Workers that
    start later, and a broker that restarts, keep to it.

    \b
    Examples:
      leveret queues pause mail
      leveret queues pause mail images --url amqp://guest:guest@localhost/
    """
    _change(queues, app, url, lambda broker, queue: broker.pause(queue), "is paused")


@click.command()
@click.argument("queues", metavar="QUEUE...", nargs=-1, required=True)
@_app_option
@url_option
def resume(queues: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have workers go on with paused queues.

    \b
    Examples:
      leveret queues resume mail
    """
    _change(queues, app, url, lambda broker, queue: broker.resume(queue), "goes on")


class _Queues(click.Command):
    """Shows the queues by itself; a group could not take MODULE:APP in the place of a command."""

    _below: ClassVar = {"pause": pause, "resume": resume}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in self._below:
            return self._below[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(cls=_Queues)
@click.argument("app", metavar="[MODULE:APP]", required=False)
@click.option("-q", "--queue", "queues", multiple=True, help="A queue to show; again for more.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, for programs.")
@url_option
def command(app: str | None, queues: tuple[str, ...], as_json: bool, url: str | None) -> None:
    """Show each queue's tasks: ready, running (RabbitMQ: unacknowledged), delayed, dead; and its consumers.

    SQLite lists all queues of the file. RabbitMQ cannot list queues without a plugin: it shows those that are named,
    the application's, and those that workers are consuming now. It needs no plugin for that.

    `leveret queues pause QUEUE...` and `leveret queues resume QUEUE...` stop and start the work on queues.

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
    elif queues:
        click.echo(f"There is no such queue: {', '.join(queues)}.")
    else:
        click.echo("No queues. On RabbitMQ, name them with -q or with MODULE:APP.")


def _change(
    queues: Sequence[str],
    app: str | None,
    url: str | None,
    change: Callable[[Broker, str], Awaitable[None]],
    done: str,
) -> None:
    broker, _ = broker_and_queues(app, url)

    async def run() -> None:
        try:
            for queue in queues:
                await change(broker, queue)
                click.echo(f"queue {queue!r} {done}")
        finally:
            await broker.close()

    asyncio.run(run())


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
        name = _escape(in_line(one.name)) + (" [yellow](paused)[/yellow]" if one.paused else "")
        table.add_row(name, str(one.ready), running, str(one.delayed), dead, str(one.consumers))
    Console().print(table)
    silent = sum(one.silent_consumers for one in stats)
    if silent:
        click.echo(f"+?: {silent} consumers are not Leveret's or did not answer; what they run is not counted.")
    missing = [in_line(queue) for one in stats for queue in one.missing]
    if missing:
        click.echo(
            f"missing: {', '.join(missing)}: deleted, or expired by a policy; what was in there is gone. They are made "
            "again when they are needed."
        )


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
