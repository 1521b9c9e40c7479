"""``leveret dead``."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING

import click
import msgspec

from leveret.cli.options import broker_and_queues, url_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker
    from leveret.model import DeadLetter


@click.group()
def command() -> None:
    """Look at tasks that cannot or shall not run again: they are kept, each with the reason."""


@command.command("list")
@click.argument("queue")
@click.option("--app", metavar="MODULE:APP", help="Take the broker's URL from this application.")
@click.option(
    "--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many, the oldest first."
)
@click.option("--json", "as_json", is_flag=True, help="A JSON array with bodies and tracebacks, for programs.")
@url_option
def list_(queue: str, app: str | None, limit: int, as_json: bool, url: str | None) -> None:
    """List a queue's dead letters.

    \b
    Examples:
      leveret dead list default
      leveret dead list default --json
    """
    broker, _ = broker_and_queues(app, url)
    letters = asyncio.run(_ask(broker, queue, limit))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode([_plain(letter) for letter in letters]), indent=2).decode())
    elif letters:
        _show(letters)
    else:
        click.echo(f"Queue {queue!r} has no dead letters.")


async def _ask(broker: Broker, queue: str, limit: int) -> Sequence[DeadLetter]:
    try:
        return await broker.dead_letters(queue, limit=limit)
    finally:
        await broker.close()


def _plain(letter: DeadLetter) -> dict[str, object]:
    envelope = letter.envelope
    return {
        "id": envelope.id,
        "task": envelope.task,
        "queue": envelope.queue,
        "attempt": envelope.attempt,
        "reason": letter.reason,
        "died_at": _time(letter.died_at),
        "enqueued_at": _time(envelope.enqueued_at),
        "body": _text(envelope.body),
        "traceback": letter.traceback,
    }


def _text(body: bytes) -> str:
    return body.decode(errors="backslashreplace")


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="seconds")


def _show(letters: Sequence[DeadLetter]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("id", "task", "died", "attempt"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reason", overflow="fold", min_width=20)
    for letter in letters:
        envelope = letter.envelope
        cells = (envelope.id, envelope.task or "-", _time(letter.died_at) or "-", str(envelope.attempt), letter.reason)
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)
