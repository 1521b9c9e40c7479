"""``leveret dead``: list, show, retry and drop what cannot or shall not run again."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from leveret.cli.options import broker_and_queues, print_json, url_option
from leveret.errors import QueueNotFound
from leveret.visible import in_line, indented

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import TypeVar

    from leveret.brokers import Broker
    from leveret.model import DeadLetter

    T = TypeVar("T")

#: Most dead letters that are looked through at once.
_MOST = 100_000
#: What may be of several lines.
_LONG = ("reason", "body", "traceback")
#: A terminal that is narrower shows the reason below the rest (columns).
_WIDE = 110
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


class _Filter(msgspec.Struct, frozen=True):
    """Which dead letters are meant."""

    ids: tuple[str, ...] = ()
    task: str | None = None
    error: str | None = None
    #: Seconds since it died: at least.
    older: float | None = None

    @property
    def is_open(self) -> bool:
        return self == _Filter()

    def matches(self, letter: DeadLetter) -> bool:
        return (
            (not self.ids or letter.envelope.id in self.ids)
            and self.task in (None, letter.envelope.task)
            and (self.error is None or self.error in letter.reason)
            and (self.older is None or (letter.died_at is not None and time.time() - letter.died_at >= self.older))
        )


def _filters(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--task", help="Only of this task."),
        click.option("--error", metavar="TEXT", help="Only those whose reason contains this."),
        click.option(
            "--older",
            metavar="SECONDS",
            type=click.FloatRange(0),
            help="Only those that died so long ago or longer; none of which that is unknown.",
        ),
        click.option("--app", metavar="MODULE:APP", help="Take the broker's URL from this application."),
        url_option,
    ):
        function = option(function)
    return function


@click.group()
def command() -> None:
    """Look at tasks that cannot or shall not run again, and decide about them. Each is kept with its reason."""


@command.command("list")
@click.argument("queue")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many, oldest first.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array with bodies and tracebacks, for programs.")
@_filters
def list_(queue: str, limit: int, as_json: bool, app: str | None, url: str | None, **filters: Any) -> None:
    """List a queue's dead letters.

    \b
    Examples:
      leveret dead list default
      leveret dead list default --task resize --error Timeout --older 3600 --json
    """
    letters = _run(app, url, lambda broker: _find(broker, queue, _Filter(**filters), whole=as_json))[:limit]
    if as_json:
        _print_json([_plain(letter) for letter in letters])
    elif letters:
        _show_table(letters)
    else:
        click.echo(f"Queue {queue!r} has no dead letters{'' if _Filter(**filters).is_open else ' that match'}.")


@command.command()
@click.argument("queue")
@click.argument("id_", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="A JSON object, for programs.")
@click.option("--app", metavar="MODULE:APP", help="Take the broker's URL from this application.")
@url_option
def show(queue: str, id_: str, as_json: bool, app: str | None, url: str | None) -> None:
    """Show one dead letter whole: its arguments, its times, its reason and its traceback.

    \b
    Examples:
      leveret dead show default 01a20edbd8e54a6e8c4dd2c8a1f0b3c7
    """
    letters = _run(app, url, lambda broker: _find(broker, queue, _Filter(ids=(id_,)), whole=True))
    if not letters:
        raise click.ClickException(f"queue {queue!r} has no dead letter {id_!r}; leveret dead list {queue} shows them")
    if as_json:
        _print_json(_plain(letters[0]))
        return
    for name, value in _plain(letters[0]).items():
        # A text of several lines stands below its name, and further in: none of them looks like another name.
        shown = str(value).rstrip()
        text = "-" if value is None else in_line(shown) if name not in _LONG else indented(shown)
        click.echo(f"{click.style(name, bold=True)}: " + (f"\n  {text}" if "\n" in text else text))


@command.command()
@click.argument("queue")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of the queue's dead letters.")
@_filters
def retry(queue: str, ids: tuple[str, ...], everything: bool, app: str | None, url: str | None, **filters: Any) -> None:
    """Put dead letters back into their queue, as first attempts. Each is there durably before it leaves here.

    \b
    Examples:
      leveret dead retry default 01a20edbd8e54a6e8c4dd2c8a1f0b3c7
      leveret dead retry default --error ConnectionError
      leveret dead retry default --all
    """
    chosen = _chosen(_Filter(ids=ids, **filters), everything=everything)

    async def revive(broker: Broker) -> Sequence[str]:
        return await broker.revive(queue, [letter.envelope.id for letter in await _find(broker, queue, chosen)])

    _report("put back", queue, ids, _run(app, url, revive))


@command.command()
@click.argument("queue")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of the queue's dead letters.")
@_filters
def drop(queue: str, ids: tuple[str, ...], everything: bool, app: str | None, url: str | None, **filters: Any) -> None:
    """Delete dead letters for good.

    \b
    Examples:
      leveret dead drop default 01a20edbd8e54a6e8c4dd2c8a1f0b3c7
      leveret dead drop default --older 604800
    """
    chosen = _chosen(_Filter(ids=ids, **filters), everything=everything)

    async def discard(broker: Broker) -> Sequence[str]:
        return await broker.discard(queue, [letter.envelope.id for letter in await _find(broker, queue, chosen)])

    _report("deleted", queue, ids, _run(app, url, discard))


def _chosen(chosen: _Filter, *, everything: bool) -> _Filter:
    if chosen.is_open and not everything:
        raise click.UsageError("say which: give IDs, a filter, or --all")
    return chosen


def _report(done: str, queue: str, ids: Sequence[str], changed: Sequence[str]) -> None:
    click.echo(f"{len(changed)} dead letter{'' if len(changed) == 1 else 's'} of queue {queue!r} {done}")
    missing = [id_ for id_ in ids if id_ not in changed]
    if missing:
        raise click.ClickException(f"not among the dead letters that match: {', '.join(map(in_line, missing))}")


def _run(reference: str | None, url: str | None, question: Callable[[Broker], Awaitable[T]]) -> T:
    broker, _ = broker_and_queues(reference, url)

    async def run() -> T:
        try:
            return await question(broker)
        finally:
            await broker.close()

    return asyncio.run(run())


async def _find(broker: Broker, queue: str, chosen: _Filter, *, whole: bool = False) -> list[DeadLetter]:
    seen = 0

    def select(letter: DeadLetter) -> DeadLetter | None:
        nonlocal seen
        seen += 1
        if not chosen.matches(letter):
            return None
        return letter if whole else _without_body(letter)

    letters = await broker.dead_letters(queue, limit=_MOST, select=select)
    if not seen and queue not in {stats.name for stats in await broker.stats([queue])}:
        raise QueueNotFound(f"queue {queue!r} does not exist; leveret queues shows those that do")
    return list(letters)


def _without_body(letter: DeadLetter) -> DeadLetter:
    """What nobody asked to see is not kept: there may be a hundred thousand of these."""
    envelope = msgspec.structs.replace(letter.envelope, body=b"", headers={})
    return msgspec.structs.replace(letter, envelope=envelope, traceback="")


def _plain(letter: DeadLetter) -> dict[str, object]:
    envelope = letter.envelope
    return {
        "id": envelope.id,
        "task": envelope.task,
        "queue": envelope.queue,
        "attempt": envelope.attempt,
        "priority": envelope.priority,
        "reason": letter.reason,
        "died_at": _time(letter.died_at),
        "worker": letter.worker,
        "enqueued_at": _time(envelope.enqueued_at),
        "body": envelope.body.decode(errors="backslashreplace"),
        "traceback": letter.traceback,
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.UTC).isoformat(timespec="seconds")


def _age(died_at: float | None) -> str:
    """How long ago, in the largest unit that fits."""
    if died_at is None:
        return "-"
    seconds = max(0.0, time.time() - died_at)
    unit, length = next(((unit, length) for unit, length in _UNITS if seconds >= length), ("s", 1))
    return f"{seconds / length:.0f} {unit}"


def _print_json(value: object) -> None:
    print_json(msgspec.json.format(msgspec.json.encode(value), indent=2))


def _show_table(letters: Sequence[DeadLetter]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rows = [[Text(in_line(cell), overflow="fold") for cell in _cells(letter)] for letter in letters]
    if console.width < _WIDE:
        for *cells, reason in rows:
            console.print(Text("  ").join(cells), Padding(reason, (0, 0, 0, 2)), sep="\n")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("id", "task", "age", "attempt", "reason"):
        table.add_column(heading, no_wrap=heading == "id", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _cells(letter: DeadLetter) -> tuple[str, ...]:
    envelope = letter.envelope
    return envelope.id, envelope.task or "-", _age(letter.died_at), str(envelope.attempt), letter.reason
