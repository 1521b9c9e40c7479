"""``leveret unique``: which unique keys are taken, and by which tasks."""

from __future__ import annotations

import sys

import click
import msgspec

from leveret.cli.options import Below, app_option, ask, print_json, target, url_option
from leveret.cli.terminal import show, table
from leveret.model.printable import in_line


@click.group(cls=Below)
def command() -> None:
    """See which unique keys are taken, and free one whose task was lost."""


@command.command("list")
@click.argument("text", required=False)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, for programs.")
@app_option
@url_option
def list_(text: str | None, limit: int, app: str | None, url: str | None, *, as_json: bool) -> None:
    """List the unique keys that are taken, or those that contain TEXT.

    \b
    Examples:
      leveret unique list
      leveret unique list sync: --limit 1000 --json
    """
    found = target(app, url)
    every = ask(found, lambda broker: broker.unique.holders(limit if text is None else sys.maxsize))
    holders = [one for one in every if text is None or text in one.key][:limit]
    if as_json:
        print_json(msgspec.json.encode(holders))
    elif holders:
        rows = table(["key", "task", "queue"], whole=["task"])
        for one in holders:
            rows.add_row(in_line(one.key), in_line(one.id), in_line(one.queue))
        show(rows)
    else:
        click.echo(f"No unique key is taken in {found.place}{'' if text is None else ' that contains the text'}.")


@command.command()
@click.argument("key")
@app_option
@url_option
def release(key: str, app: str | None, url: str | None) -> None:
    """Free a unique key, though its task has not ended. The task itself stays. Exits 1 when nobody has the key.

    \b
    Example:
      leveret unique release sync:42
    """
    found = target(app, url)
    id_ = ask(found, lambda broker: broker.unique.release(key))
    if id_ is None:
        click.echo(
            f"Nobody has the key {in_line(key)} in {found.place}; leveret unique list shows those that are taken."
        )
        sys.exit(1)
    click.echo(f"The key {in_line(key)} of task {in_line(id_)} is free.")
