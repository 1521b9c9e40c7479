"""``leveret tasks``: which tasks wait in a queue."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import click
import msgspec

from leveret.cli.completing import complete_queue
from leveret.cli.options import Below, app_option, ask, local_time, print_json, target, url_option
from leveret.cli.terminal import show, table
from leveret.model.printable import in_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import WaitingState
    from leveret.model import Envelope

#: So much of a task's arguments is shown (characters).
_BEGINNING = 60


@click.group(cls=Below)
def command() -> None:
    """See which tasks wait in a queue."""


@command.command("list")
@click.argument("queue", shell_complete=complete_queue)
@click.option(
    "--state",
    type=click.Choice(("ready", "delayed")),
    default="ready",
    show_default=True,
    help="Those that may be taken now, or those that are not due yet.",
)
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array with whole bodies, for programs.")
@app_option
@url_option
def list_(queue: str, state: WaitingState, limit: int, app: str | None, url: str | None, *, as_json: bool) -> None:
    """List tasks that wait in a queue: those that are taken next, or are due next, first. They stay where they are.

    RabbitMQ shows what is ready, at most 32 tasks, in quorum queues since version 4.3 and in classic queues. Workers
    cannot have these for a moment, and those of a quorum queue then come before what is enqueued later with a higher
    priority. Older quorum queues would count each look as a return of the task, and delayed tasks would come late:
    there the command refuses to look, and exits 1.

    \b
    Examples:
      leveret tasks list default
      leveret tasks list mail --state delayed --limit 100 --json
    """
    found = target(app, url)
    tasks = ask(found, lambda broker: broker.queues.peek(queue, state, limit=limit))
    if as_json:
        print_json(msgspec.json.format(msgspec.json.encode([_plain(one) for one in tasks]), indent=2))
    elif tasks:
        _show(tasks)
    else:
        click.echo(f"Nothing is {state} in queue {queue!r}.")


def _show(tasks: Sequence[Envelope]) -> None:
    numbers = ("priority", "attempt")
    rows = table(("id", "task", "enqueued", "due", *numbers, "arguments"), right=numbers, whole=("id",))
    for one in tasks:
        rows.add_row(
            in_line(one.id),
            in_line(one.task or "-"),
            *("-" if moment is None else local_time(moment) for moment in (one.enqueued_at, one.due)),
            "-" if one.priority is None else str(one.priority),
            str(one.attempt),
            _beginning(one.body),
        )
    show(rows)


def _beginning(body: bytes) -> str:
    # One character may be four bytes.
    text = body[: 4 * _BEGINNING + 4].decode(errors="backslashreplace")
    return in_line(text if len(text) <= _BEGINNING else f"{text[: _BEGINNING - 1]}…")


def _plain(one: Envelope) -> dict[str, object]:
    return {
        "id": one.id,
        "task": one.task,
        "queue": one.queue,
        "attempt": one.attempt,
        "priority": one.priority,
        "enqueued_at": _utc(one.enqueued_at),
        "due": _utc(one.due),
        "expires_at": _utc(one.expires_at),
        "body": one.body.decode(errors="backslashreplace"),
    }


def _utc(seconds: float | None) -> str | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="milliseconds")
