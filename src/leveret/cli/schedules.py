"""``leveret schedules``: what is enqueued by itself, and when; paused, resumed, triggered and removed here."""

from __future__ import annotations

import datetime as dt
import time
from itertools import islice
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import click
import msgspec

from leveret.cli.completing import complete_schedule
from leveret.cli.options import Listing, app_option, ask, local_time, print_json, target, url_option
from leveret.cli.terminal import show, table
from leveret.errors import ScheduleNotFound
from leveret.model import Cron, Pause, Remove, Resume, ScheduleRow, Trigger
from leveret.model.printable import in_line
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from leveret.brokers import Broker
    from leveret.model import Change, ScheduleRequest

#: How a schedule's state is shown; the rest is shown plain.
_STYLES = {"paused": "yellow", "resting": "yellow", "ended": "dim"}

_names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_schedule)


@click.group(cls=Listing)
def command() -> None:
    """See which tasks are enqueued by themselves, and when; pause, resume, trigger and remove such schedules.

    `leveret schedules` alone lists them.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON array with the tasks' arguments, for programs.")
@app_option
@url_option
def list_(as_json: bool, app: str | None, url: str | None) -> None:
    """List the schedules: when they come, the next and the last instant (in your zone), and their state.

    active: its tasks are enqueued. paused: somebody paused it, or Leveret did, and then the reason is given. resting:
    it is in the code of an application that has no worker now. ended: it never comes again.

    missed: instants that passed without a task, since no worker was there. skipped: those that were left out because
    the task before was not finished.

    \b
    Examples:
      leveret schedules
      leveret schedules list --app tasks:app --json
    """
    found = target(app, url)
    rows = ask(found, lambda broker: broker.schedules.read())
    if as_json:
        print_json(msgspec.json.format(msgspec.json.encode([_plain(row, time.time()) for row in rows]), indent=2))
    elif rows:
        _show(rows, time.time())
    else:
        click.echo(f"No schedules in {found.place}. A worker of the application brings those of its code.")


@command.command("next")
@click.argument("name", shell_complete=complete_schedule)
@click.option("--count", type=click.IntRange(1, 1_000), default=5, show_default=True, help="So many instants.")
@app_option
@url_option
def next_(name: str, count: int, app: str | None, url: str | None) -> None:
    """Show the next instants of a schedule, in its zone and in UTC.

    \b
    Examples:
      leveret schedules next nightly
      leveret schedules next nightly --count 20
    """

    async def look(broker: Broker) -> ScheduleRow:
        return (await _named(broker, [name]))[0]

    row = ask(target(app, url), look)
    now = time.time()
    instants = list(islice(row.schedule.timing.instants(now), count))
    if instants:
        _show_instants(row, instants)
    else:
        click.echo(f"schedule {in_line(name)!r} never comes again")
    state = row.state(now)
    if state in ("paused", "resting"):
        click.echo(f"It is {state}, so nothing is enqueued then{_reason(row)}.", err=True)


@command.command()
@_names_argument
@app_option
@url_option
def pause(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have schedules enqueue nothing until they are resumed, whatever workers come and go.

    \b
    Examples:
      leveret schedules pause nightly
    """
    _change(names, app, url, Pause, lambda name, _: f"schedule {name!r} is paused")


@command.command()
@_names_argument
@app_option
@url_option
def resume(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have paused schedules go on with their next instant. What passed meanwhile is not made up for.

    \b
    Examples:
      leveret schedules resume nightly
    """
    _change(names, app, url, Resume, lambda name, _: f"schedule {name!r} goes on")


@command.command()
@_names_argument
@app_option
@url_option
def trigger(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Enqueue a task of each schedule now, besides those of its instants, and print the task's id.

    \b
    Examples:
      leveret schedules trigger nightly
      leveret result "$(leveret schedules trigger nightly)" --wait
    """
    _change(names, app, url, lambda name: Trigger(name, time.time()), lambda _, change: change.tasks[0].id)


@command.command()
@_names_argument
@app_option
@url_option
def remove(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Remove schedules that are data. Their tasks that are enqueued stay.

    Those of an application's code go with their code: remove them there, or pause them.

    \b
    Examples:
      leveret schedules remove digest:42
    """
    _change(names, app, url, Remove, lambda name, _: f"schedule {name!r} is removed")


def _change(
    names: Sequence[str],
    app: str | None,
    url: str | None,
    request: Callable[[str], ScheduleRequest],
    done: Callable[[str, Change], str],
) -> None:
    """Ask for it for each, and tell what was done; all are looked for before anything is changed."""

    async def each(broker: Broker) -> None:
        await _named(broker, names)
        for name in dict.fromkeys(names):
            click.echo(done(name, await broker.schedules.ask(request(name))))

    ask(target(app, url), each)


async def _named(broker: Broker, names: Sequence[str]) -> list[ScheduleRow]:
    """Raises ScheduleNotFound, with what was perhaps meant."""
    known = {row.name: row for row in await broker.schedules.read()}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or "; `leveret schedules` shows those that do"
            raise ScheduleNotFound(f"schedule {name!r} does not exist{hint}")
    return [known[name] for name in names]


def _reason(row: ScheduleRow) -> str:
    return f": {in_line(row.problem)}" if row.problem else ""


def _show(rows: Sequence[ScheduleRow], now: float) -> None:
    from rich.text import Text

    shown = table(("name", "when", "next", "last", "missed", "skipped", "state"), right=("missed", "skipped"))
    for row in rows:
        state = row.state(now)
        shown.add_row(
            Text(in_line(row.name)),
            Text(in_line(row.when)),
            *("-" if moment is None else local_time(moment) for moment in (row.coming(now), row.last)),
            *(str(count) for count in (row.missed, row.skipped)),
            Text(f"{state}{_reason(row)}", _STYLES.get(state, "")),
        )
    show(shown)
    for origin in dict.fromkeys(row.schedule.origin for row in rows if row.state(now) == "resting"):
        click.echo(f"resting: no worker of {in_line(str(origin))} is there.")


def _show_instants(row: ScheduleRow, instants: Sequence[float]) -> None:
    timing = row.schedule.timing
    zone = ZoneInfo(timing.tz) if isinstance(timing, Cron) and timing.tz != "UTC" else None
    headings = [*([timing.tz] if isinstance(timing, Cron) and zone else []), "UTC", *(["due"] if timing.jitter else [])]
    shown = table(headings)
    for instant in instants:
        cells = [f"{dt.datetime.fromtimestamp(instant, zone):%a %Y-%m-%d %H:%M:%S %Z}"] if zone else []
        cells.append(_utc(instant))
        if timing.jitter:
            cells.append(_utc(timing.due(row.name, instant)))
        shown.add_row(*cells)
    show(shown)


def _utc(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _utc_or_none(moment: float | None) -> str | None:
    return None if moment is None else _utc(moment)


def _plain(row: ScheduleRow, now: float) -> dict[str, Any]:
    message = row.schedule.message
    return {
        "name": row.name,
        "when": row.when,
        "task": message.task,
        "queue": message.queue,
        "body": message.body.decode(errors="backslashreplace"),
        "next": _utc_or_none(row.coming(now)),
        "last": _utc_or_none(row.last),
        "state": row.state(now),
        "problem": row.problem,
        "missed": row.missed,
        "skipped": row.skipped,
        "application": row.schedule.origin,
        **dict(_options(row)),
    }


def _options(row: ScheduleRow) -> Iterator[tuple[str, object]]:
    timing = row.schedule.timing
    for name in ("jitter", "catch_up", "grace", "overlap"):
        yield name, getattr(timing, name)
