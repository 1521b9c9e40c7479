"""``leveret queues``, and below it ``pause``, ``resume``, ``purge`` and ``delete``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import click
import msgspec

from leveret.cli.completing import complete_app, complete_queue
from leveret.cli.options import app_option, ask, print_json, target, unknown_queue, url_option
from leveret.cli.terminal import show, table
from leveret.model.printable import in_line
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from leveret.brokers import Broker
    from leveret.model import QueueStats, Removed

_queues_argument = click.argument("queues", metavar="QUEUE...", nargs=-1, required=True, shell_complete=complete_queue)


@click.command()
@_queues_argument
@app_option
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
    _change(queues, app, url, lambda broker, queue: broker.queues.pause(queue), "is paused")


@click.command()
@_queues_argument
@app_option
@url_option
def resume(queues: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have workers go on with paused queues.

    \b
    Examples:
      leveret queues resume mail
    """
    _change(queues, app, url, lambda broker, queue: broker.queues.resume(queue), "goes on")


def _removal_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--yes", "-y", is_flag=True, help="Do not ask."),
        click.option("--force", is_flag=True, help="Though workers consume it; what runs is finished."),
        app_option,
        url_option,
        _queues_argument,
    ):
        function = option(function)
    return function


@click.command()
@_removal_options
def purge(queues: tuple[str, ...], yes: bool, force: bool, app: str | None, url: str | None) -> None:
    """Delete all tasks that wait in these queues: ready, limited or delayed. They never run. Dead letters stay.

    Refused while a queue has consumers, unless with --force.

    \b
    Examples:
      leveret queues purge mail
      leveret queues purge mail images --yes
    """
    _remove(queues, app, url, "purge", yes=yes, force=force)


@click.command()
@_removal_options
def delete(queues: tuple[str, ...], yes: bool, force: bool, app: str | None, url: str | None) -> None:
    """Delete these queues with all that waits in them: ready, limited or delayed; and with their dead letters.

    Refused while a queue has consumers, unless with --force: then their workers keep the queue, empty.

    \b
    Examples:
      leveret queues delete nosuch
      leveret queues delete old-mail --yes --url amqp://guest:guest@localhost/
    """
    _remove(queues, app, url, "delete", yes=yes, force=force)


class _Queues(click.Command):
    """Shows the queues by itself; a group could not take MODULE:APP in the place of a command."""

    below: ClassVar = {"pause": pause, "resume": resume, "purge": purge, "delete": delete}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        first = args[0] if args else ""
        if first in self.below:
            return self.below[first].make_context(f"{info_name} {first}", args[1:], parent, **extra)
        if first and not first.startswith("-") and ":" not in first and not extra.get("resilient_parsing"):
            known = ", ".join(self.below)
            raise click.UsageError(
                f"{first!r} is neither MODULE:APP nor one of {known}{did_you_mean(first, self.below)}"
            )
        return super().make_context(info_name, args, parent, **extra)


def _complete_first(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    below = [name for name in _Queues.below if name.startswith(incomplete)]
    return [*below, *complete_app(context, parameter, incomplete)]


@click.command(cls=_Queues)
@click.argument("app", metavar="[MODULE:APP]", required=False, envvar="LEVERET_APP", shell_complete=_complete_first)
@click.option(
    "-q", "--queue", "queues", multiple=True, shell_complete=complete_queue, help="A queue to show; again for more."
)
@click.option("--json", "as_json", is_flag=True, help="A JSON array, for programs.")
@url_option
def command(app: str | None, queues: tuple[str, ...], as_json: bool, url: str | None) -> None:
    """Show each queue's tasks: ready, limited, running (RabbitMQ: unacknowledged), delayed, dead; and its consumers.

    limited: they wait for a limit (see leveret limits), or for their turn.

    SQLite lists all queues of the file. RabbitMQ cannot list queues without a plugin: it shows those that are named,
    the application's, and those that workers are consuming now. It needs no plugin for that.

    `leveret queues pause QUEUE...` and `leveret queues resume QUEUE...` stop and start the work on queues.
    `leveret queues purge QUEUE...` deletes what waits in them, and `leveret queues delete QUEUE...` the queues too.

    \b
    Examples:
      leveret queues
      leveret queues tasks:app --json
      leveret queues -q task_queue --url amqp://guest:guest@localhost/
    """
    found = target(app, url)
    names = list(dict.fromkeys([*queues, *found.queues]))
    every = ask(found, lambda broker: broker.queues.stats(names))
    stats = [one for one in every if not queues or one.name in queues]
    missing = [name for name in queues if name not in {one.name for one in every}]
    if as_json:
        print_json(msgspec.json.format(msgspec.json.encode(stats), indent=2))
    elif stats:
        _show(stats)
    elif not queues:
        click.echo(f"No queues in {found.place}.{_hint(found.place)}")
    if missing and not as_json:
        hints = "".join(did_you_mean(name, [one.name for one in every]) for name in missing)
        click.echo(
            f"There is no such queue in {found.place}: {', '.join(map(in_line, missing))}{hints or '.'}",
            err=bool(stats),
        )


def _hint(place: str) -> str:
    if "://" in place:
        return " RabbitMQ cannot list them: name them with -q or with MODULE:APP."
    from pathlib import Path

    return "" if Path(place).exists() else " There is no such file; an enqueue, or a worker, makes it."


def _change(
    queues: Sequence[str],
    app: str | None,
    url: str | None,
    change: Callable[[Broker, str], Awaitable[None]],
    done: str,
) -> None:
    async def each(broker: Broker) -> None:
        for queue in queues:
            await change(broker, queue)
            click.echo(f"queue {queue!r} {done}")

    ask(target(app, url), each)


def _remove(queues: Sequence[str], app: str | None, url: str | None, act: str, *, yes: bool, force: bool) -> None:
    """Tell what there is, ask, and do it; all queues are looked at before anything is changed."""
    found = target(app, url)
    names = list(dict.fromkeys(queues))

    async def all_of_them(broker: Broker) -> None:
        stats = {one.name: one for one in await broker.queues.stats(names)}
        for queue in names:
            if queue not in stats:
                raise unknown_queue(queue, stats)
        if not yes:
            _confirm([stats[queue] for queue in names], act, found.place)
        for queue in names:
            removed = await (broker.queues.purge if act == "purge" else broker.queues.delete)(queue, force=force)
            click.echo(f"queue {queue!r} is {act}d{_kept(removed)}: {_counted(removed, act)}")

    ask(found, all_of_them)


def _confirm(stats: Sequence[QueueStats], act: str, place: str) -> None:
    for one in stats:
        click.echo(
            f"queue {one.name!r} in {place}: {one.ready} ready, {one.limited} limited, {one.running} running, "
            f"{one.delayed} delayed, {one.dead} dead, {one.consumers} consumers",
            err=True,
        )
    if not sys.stdin.isatty():
        raise click.UsageError(f"say --yes to {act} without being asked")
    click.confirm(f"{act.capitalize()} {'it' if len(stats) == 1 else 'them'}?", abort=True)


def _counted(removed: Removed, act: str) -> str:
    dead = f" and {removed.dead} dead" if act == "delete" else ""
    return f"{removed.ready} ready{',' if dead else ' and'} {removed.delayed} delayed{dead} tasks are gone"


def _kept(removed: Removed) -> str:
    return ", and its workers keep it" if removed.kept else ""


def _show(stats: Sequence[QueueStats]) -> None:
    from rich.text import Text

    numbers = ("ready", "limited", "running", "delayed", "dead", "consumers")
    shown = table(("name", *numbers), right=numbers)
    for one in stats:
        name = Text(in_line(one.name))
        if one.paused:
            name.append(" (paused)", "yellow")
        running = f"{one.running}+?" if one.silent_consumers else str(one.running)
        dead = Text(str(one.dead), "red" if one.dead else "")
        shown.add_row(name, str(one.ready), str(one.limited), running, str(one.delayed), dead, str(one.consumers))
    show(shown)
    silent = sum(one.silent_consumers for one in stats)
    if silent:
        click.echo(f"+?: {silent} consumers are not Leveret's or did not answer; what they run is not counted.")
    missing = [in_line(queue) for one in stats for queue in one.missing]
    if missing:
        click.echo(
            f"missing: {', '.join(missing)}: deleted, or expired by a policy; what was in there is gone. They are made "
            "again when they are needed."
        )
