"""``leveret enqueue``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click
import msgspec

from leveret.app import load_app
from leveret.cli.options import url_option
from leveret.model import MAX_PRIORITY

if TYPE_CHECKING:
    from leveret.app import App
    from leveret.task import Task


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("app", metavar="MODULE:APP")
@click.argument("task")
@click.argument("arguments", metavar="[ARG]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--kwargs", metavar="JSON", default="{}", help="Keyword arguments, as a JSON object.")
@click.option("-q", "--queue", help="Instead of the task's own queue.")
@click.option("--priority", type=click.IntRange(0, MAX_PRIORITY), help="The higher first; none is like 4.")
@click.option("--id", help="The task's id. On SQLite one that is taken is refused.")
@url_option
def command(app: str, task: str, arguments: tuple[str, ...], kwargs: str, url: str | None, **options: Any) -> None:
    """Enqueue one task and print its id.

    Each ARG is JSON (80, true, '[1, 2]'), else a string. A task that takes the raw body gets the one ARG as it is.

    \b
    Examples:
      leveret enqueue tasks:app resize cat.png 80
      leveret enqueue tasks:app resize --kwargs '{"path": "cat.png", "width": 80}'
      leveret enqueue tasks:app send_invoice 42 --id invoice-42 --priority 9
    """
    application = load_app(app)
    if url is not None:
        application.connect_to(url)
    found = application.find(task, options["queue"] or "").options(**options)
    values = [argument.encode() for argument in arguments] if found.signature.raw else [*map(_value, arguments)]
    click.echo(asyncio.run(_enqueue(application, found, values, _keywords(kwargs))))


async def _enqueue(app: App, task: Task[..., Any], arguments: list[Any], keywords: dict[str, Any]) -> str:
    try:
        return (await task.enqueue(*arguments, **keywords)).id
    finally:
        await app.close()


def _value(argument: str) -> Any:
    try:
        return msgspec.json.decode(argument)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return argument


def _keywords(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise click.BadParameter(f"{text!r} is not a JSON object: {error}", param_hint="--kwargs") from None
