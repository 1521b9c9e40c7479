"""``leveret status``, ``leveret result`` and ``leveret cancel``: one task, by its id."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from leveret.brokers import location
from leveret.cli.durations import DURATION
from leveret.cli.options import TIMEOUT, app_option, loaded, local_time, print_json, url_option, within
from leveret.client import App
from leveret.errors import ResultTimeout, TaskFailed, TaskNotFound
from leveret.model.printable import in_line, indented

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from leveret.client import Handle
    from leveret.model import Status

T = TypeVar("T")


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.argument("id_", metavar="ID")(app_option(url_option(function)))


@click.command(name="status")
@_options
@click.option("--follow", is_flag=True, help="Go on telling what changes, until it has ended.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def status(id_: str, app: str | None, url: str | None, *, follow: bool, as_json: bool) -> None:
    """Tell what has become of a task.

    \b
    Examples:
      leveret status 019aaf0f2cf37dc0
      leveret status invoice-42 --follow --app tasks:app
    """
    show = _show_json if as_json else _show

    async def run(handle: Handle[Any]) -> None:
        known = await handle.status()
        show(known)
        if follow:
            async for update in handle.updates():
                if update != known:  # they begin with what is known
                    show(update)

    _with_handle(app, url, id_, run)


@click.command(name="result")
@_options
@click.option("--wait", is_flag=True, help="Until it has ended.")
@click.option("--timeout", type=DURATION, help="Wait at most so long: seconds, or 30s, 5m.")
def result(id_: str, app: str | None, url: str | None, *, wait: bool, timeout: float | None) -> None:
    """Print what a task returned, as JSON. Exits 1 when it failed, was cancelled, or has not ended."""

    async def run(handle: Handle[Any]) -> bytes:
        known = await handle.status()
        if not (known.is_final or wait or timeout):
            raise ResultTimeout(f"task {id_} is {known.state}; wait for it with --wait")
        value = await handle.result(timeout)
        return msgspec.json.encode(value)

    try:
        body = _with_handle(app, url, id_, run)
    except TaskFailed as error:
        click.echo(indented(error.traceback or "").rstrip(), err=True)
        raise
    print_json(body)


@click.command(name="cancel")
@_options
@click.option("--timeout", type=DURATION, default=5.0, show_default=True, help="How long it may take to end.")
def cancel(id_: str, app: str | None, url: str | None, *, timeout: float) -> None:
    """Have a task not run, or end if it runs. Exits 1 when it has ended otherwise, or still runs."""
    known = _with_handle(app, url, id_, lambda handle: handle.cancel(timeout=timeout))
    _show(known)
    if known.state != "cancelled":
        sys.exit(1)


def _with_handle(reference: str | None, url: str | None, id_: str, ask: Callable[[Handle[Any]], Awaitable[T]]) -> T:
    app = App(url, enqueue_timeout=TIMEOUT) if reference is None else loaded(reference, url)

    async def run() -> T:
        try:
            return await ask(app.handle(id_))
        except TaskNotFound as error:
            raise within(error, location(app.url)) from error
        finally:
            await app.close()

    return asyncio.run(run())


def _show_json(status: Status) -> None:
    # A body may hold what only some may see; the dashboard can redact it.
    print_json(msgspec.json.encode(msgspec.structs.replace(status, body=None)))


def _show(status: Status) -> None:
    """One line, and the traceback of what failed."""
    parts = [f"{status.state:<9}", in_line(status.task or "(default task)"), f"on {in_line(status.queue)}"]
    if status.attempt > 1 or status.started_at is not None or status.state == "dead":
        parts.append(f"attempt {status.attempt}")
    if status.due is not None:
        parts.append(f"due in {max(0.0, status.due - time.time()):.0f} s")
    if status.progress is not None:
        total = "" if status.progress.total is None else f"/{status.progress.total:g}"
        parts.append(f"{status.progress.done:g}{total} {in_line(status.progress.note)}".rstrip())
    if status.worker is not None:
        parts.append(f"by {in_line(status.worker)}")
    # Nobody tells when a foreign dead letter died.
    parts.append(f"since {local_time(status.at)}" if status.at else "since when is unknown")
    click.echo("  ".join(parts))
    if status.error:
        click.echo(f"  {in_line(status.error)}")
    if status.problem:
        click.echo(f"  {in_line(status.problem)}")
