"""``leveret limits``: how many tasks may be under way or start, and how many wait for that; changed and paused here."""

from __future__ import annotations

import datetime as dt
import re
import time
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

from leveret.cli.completing import complete_limit
from leveret.cli.durations import seconds_of
from leveret.cli.options import Listing, app_option, ask, local_time, print_json, target, url_option
from leveret.cli.terminal import show, table
from leveret.errors import LimitNotFound
from leveret.model import LimitRow, LimitUse, PauseLimit, Rate, RemoveLimit, ResumeLimit, SetLimit, checked_rule
from leveret.model.printable import in_line
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers import Broker
    from leveret.model import LimitRequest, LimitRule

_RATE = re.compile(r"(\d+)\s*/\s*(.+)")
_TIMES = {
    **dict.fromkeys(("second", "s"), 1.0),
    **dict.fromkeys(("minute", "m", "min"), 60.0),
    **dict.fromkeys(("hour", "h"), 3_600.0),
    **dict.fromkeys(("day", "d"), 86_400.0),
}

_names_argument = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_limit)


class _RateType(click.ParamType[Any]):
    name = "COUNT/TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        text = str(value).strip().lower()
        if text == "none":
            return text
        match = _RATE.fullmatch(text)
        per = None if match is None else _TIMES.get(match[2], seconds_of(match[2]))
        if match is None or per is None:
            self.fail(f"{value!r} is no rate: write 100/60, 100/minute, 5/s, 1000/2h, or none", param, ctx)
        return int(match[1]), per


class _CountType(click.ParamType[Any]):
    name = "COUNT"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        text = str(value).strip().lower()
        if text != "none" and not (text.isascii() and text.isdigit()):
            self.fail(f"{value!r} is no whole number: write one of at least 1, or none", param, ctx)
        return text if text == "none" else int(text)


@click.group(cls=Listing)
def command() -> None:
    """See how many tasks may be under way or start, and how many wait for that; change, pause and remove such limits.

    `leveret limits` alone lists them.
    """


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="A JSON array, for programs.")
@app_option
@url_option
def list_(as_json: bool, app: str | None, url: str | None) -> None:
    """List the limits: what each allows, how many tasks it has admitted, how many wait for it, and of how many keys.

    The limit of a whole queue is called queue:NAME. A limit with keys allows each of them that much.

    paused: somebody paused it. rests: a task has said so for a while, of a key (raise Limited).

    \b
    Examples:
      leveret limits
      leveret limits list --app tasks:app --json
    """
    found = target(app, url)
    uses, now = ask(found, lambda broker: broker.limits.read()), time.time()
    if as_json:
        print_json(msgspec.json.format(msgspec.json.encode([_plain(one, now) for one in uses]), indent=2))
    elif uses:
        _show(uses, now)
    else:
        click.echo(f"No limits in {found.place}. A worker of the application brings those of its code.")


@command.command("set")
@click.argument("name", shell_complete=complete_limit)
@click.option("--concurrency", type=_CountType(), help="The most tasks under way at once; none: any number.")
@click.option("--rate", type=_RateType(), help="How many may start, as 100/minute or 5/10s; none: any number.")
@click.option(
    "--burst", type=click.IntRange(1), help="How many may start at once. With --rate.  [default: a twentieth]"
)
@click.option("--code", "as_in_code", is_flag=True, help="What the code says is in force again.")
@app_option
@url_option
def set_(
    name: str,
    concurrency: int | Literal["none"] | None,
    rate: tuple[int, float] | Literal["none"] | None,
    burst: int | None,
    as_in_code: bool,
    app: str | None,
    url: str | None,
) -> None:
    """Change what a limit allows, in place of what the code says, until it is set to that again with --code.

    What is not named stays as it is. It is in force within a second; tasks that are under way are finished.

    \b
    Examples:
      leveret limits set stripe --concurrency 5
      leveret limits set stripe --rate 100/minute --burst 10
      leveret limits set stripe --code
    """
    if as_in_code == (concurrency is not None or rate is not None):
        raise click.UsageError("say --concurrency, --rate or both, or else --code")
    if burst is not None and not isinstance(rate, tuple):
        raise click.UsageError("--burst goes with --rate")

    def changed(row: LimitRow) -> LimitRule | None:
        if as_in_code:
            return None
        return checked_rule(
            f"limit {name!r}",
            row.rule.concurrency if concurrency is None else None if concurrency == "none" else concurrency,
            row.rule.rate if rate is None else None if rate == "none" else Rate(*rate, burst),
        )

    async def change(broker: Broker) -> LimitRule:
        (row,) = await _named(broker, [name])
        rule = changed(row)
        await broker.limits.ask(SetLimit(name, rule))
        return row.declared if rule is None else rule

    click.echo(f"limit {in_line(name)!r} allows: {ask(target(app, url), change)}")


@command.command()
@_names_argument
@app_option
@url_option
def pause(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have limits admit nothing until they are resumed. Tasks that are under way are finished.

    \b
    Examples:
      leveret limits pause stripe
    """
    _change(names, app, url, PauseLimit, "is paused")


@command.command()
@_names_argument
@app_option
@url_option
def resume(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Have limits go on that are paused, or that rest because a task said so.

    \b
    Examples:
      leveret limits resume stripe
    """
    _change(names, app, url, ResumeLimit, "goes on")


@command.command()
@_names_argument
@app_option
@url_option
def remove(names: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Remove limits that no code has any more. What waits for them is let go.

    A worker whose code has the limit brings it back.

    \b
    Examples:
      leveret limits remove queue:render
    """
    _change(names, app, url, RemoveLimit, "is removed")


def _change(
    names: Sequence[str], app: str | None, url: str | None, request: Callable[[str], LimitRequest], done: str
) -> None:
    """Ask for it for each; all are looked for before anything is changed."""

    async def each(broker: Broker) -> None:
        await _named(broker, names)
        for name in dict.fromkeys(names):
            await broker.limits.ask(request(name))
            click.echo(f"limit {in_line(name)!r} {done}")

    ask(target(app, url), each)


async def _named(broker: Broker, names: Sequence[str]) -> list[LimitRow]:
    """Raises LimitNotFound, with what was perhaps meant."""
    known = {one.row.name: one.row for one in await broker.limits.read()}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or "; `leveret limits` shows those that do"
            raise LimitNotFound(f"limit {name!r} does not exist{hint}")
    return [known[name] for name in names]


def _show(uses: Sequence[LimitUse], now: float) -> None:
    from rich.text import Text

    numbers = ("admitted", "waiting", "keys")
    shown = table(("name", "allows", *numbers, "state"), right=numbers)
    for one in uses:
        row, state = one.row, one.row.state(now)
        allows = Text(str(row.rule))
        if row.changed is not None and row.changed != row.declared:
            allows.append(f" (code: {row.declared})", "dim")
        counts = [str(count) for count in (one.admitted, one.waiting, one.keys)]
        shown.add_row(Text(in_line(row.name)), allows, *counts, Text(_words(row, state, now), _style(state)))
    show(shown)


def _style(state: str) -> str:
    return "" if state == "active" else "yellow"


def _words(row: LimitRow, state: str, now: float) -> str:
    resting = row.rest(now)
    if not resting:
        return state
    until = f"until {local_time(max(resting.values()))}"
    if len(resting) > 1:
        return f"{state}, {len(resting)} keys rest, {until} at the latest"
    (key,) = resting
    of = f"key {in_line(key)} rests " if key else "rests "
    return f"{of}{until}" if state == "resting" else f"{state}, {of}{until}"


def _plain(one: LimitUse, now: float) -> dict[str, Any]:
    row = one.row
    return {
        "name": row.name,
        **_rule(row.rule),
        "code": _rule(row.declared),
        "changed": row.changed is not None,
        "state": row.state(now),
        "resting": {key: _utc(until) for key, until in row.rest(now).items()},
        "admitted": one.admitted,
        "waiting": one.waiting,
        "keys": one.keys,
    }


def _rule(rule: LimitRule) -> dict[str, Any]:
    return {"concurrency": rule.concurrency, "rate": None if rule.rate is None else msgspec.to_builtins(rule.rate)}


def _utc(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
