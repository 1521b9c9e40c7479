"""``leveret dead``: list, show, retry and drop what cannot or shall not run again."""

from __future__ import annotations

import datetime as dt
import time
from typing import TYPE_CHECKING, Any

import click
import msgspec

from leveret.cli.completing import complete_queue
from leveret.cli.durations import DURATION
from leveret.cli.options import Below, app_option, ask, print_json, require, target, url_option
from leveret.cli.terminal import console, table
from leveret.cli.terminal import show as show_table
from leveret.errors import QueueNotFound
from leveret.model.printable import in_line, indented
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from rich.text import Text

    from leveret.brokers import Broker, DeadLetters
    from leveret.model import DeadLetter

#: So many ids are named that could not be put back.
_MOST_NAMED = 20
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
            type=DURATION,
            help="Only those that died so long ago or longer (seconds, or 2h, 7d); none of which that is unknown.",
        ),
        _queue_option,
        app_option,
        url_option,
    ):
        function = option(function)
    return function


_queue_option = click.option(
    "-q", "--queue", "queues", multiple=True, shell_complete=complete_queue, help="A queue; again for more. Else all."
)


@click.group(cls=Below)
def command() -> None:
    """Look at tasks that cannot or shall not run again, and decide about them. Each is kept with its reason."""


@command.command("list")
@click.argument("queue", metavar="[QUEUE]", required=False, shell_complete=complete_queue)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many, oldest first.")
@click.option("--json", "as_json", is_flag=True, help="A JSON array with bodies and tracebacks, for programs.")
@_filters
def list_(
    queue: str | None,
    limit: int,
    as_json: bool,
    queues: tuple[str, ...],
    app: str | None,
    url: str | None,
    **filters: Any,
) -> None:
    """List the dead letters of a queue, or of all queues.

    RabbitMQ cannot list queues: all are those of --app, and those that workers are consuming now.

    \b
    Examples:
      leveret dead list
      leveret dead list default --task resize --error Timeout --older 1h --json
    """
    chosen = _Filter(**filters)
    found = target(app, url)
    named = [*queues, *([queue] if queue else [])]

    async def look(broker: Broker) -> tuple[list[str], list[DeadLetter]]:
        names = await _queues(broker, named, found.queues)
        return names, [letter for name in names for letter in await _find(broker, name, chosen, whole=as_json)]

    names, letters = ask(found, look)
    letters = sorted(letters, key=lambda letter: letter.died_at or 0.0)[:limit]
    if as_json:
        _print_json([_plain(letter) for letter in letters])
    elif letters:
        _show(letters, with_queue=len(names) > 1)
    else:
        which = f"Queue {named[0]!r} has" if len(named) == 1 else f"The queues in {found.place} have"
        which = which if names else f"There are no queues in {found.place}, so there are"
        click.echo(f"{which} no dead letters{'' if chosen.is_open else ' that match'}.")


@command.command()
@click.argument("words", metavar="[QUEUE] ID", nargs=-1, required=True, shell_complete=complete_queue)
@click.option("--json", "as_json", is_flag=True, help="A JSON object, for programs.")
@_queue_option
@app_option
@url_option
def show(words: tuple[str, ...], as_json: bool, queues: tuple[str, ...], app: str | None, url: str | None) -> None:
    """Show one dead letter whole: its arguments, its times, its reason and its traceback.

    \b
    Examples:
      leveret dead show 01a20edbd8e54a6e8c4dd2c8a1f0b3c7
      leveret dead show default invoice-42
    """
    found = target(app, url)

    async def look(broker: Broker) -> DeadLetter:
        scope = await _scope(broker, words, queues, found.queues)
        if len(scope.ids) != 1:
            raise click.UsageError("show takes one ID, and its queue before it")
        (id_,) = scope.ids
        for name in scope.queues:
            for letter in await _find(broker, name, _Filter(ids=(id_,)), whole=True):
                return letter
        if scope.named and len(scope.queues) == 1:
            name = scope.queues[0]
            raise click.ClickException(
                f"queue {name!r} has no dead letter {id_!r}; leveret dead list {name} shows them"
            )
        raise _not_found(scope, [id_])

    letter = ask(found, look)
    if as_json:
        _print_json(_plain(letter))
        return
    for name, value in _plain(letter).items():
        # A text of several lines stands below its name, and further in: none of them looks like another name.
        shown = str(value).rstrip()
        text = "-" if value is None else in_line(shown) if name not in _LONG else indented(shown)
        click.echo(f"{click.style(name, bold=True)}: " + (f"\n  {text}" if "\n" in text else text))


@command.command()
@click.argument("words", metavar="[QUEUE] [ID]...", nargs=-1, shell_complete=complete_queue)
@click.option("--all", "everything", is_flag=True, help="All of the queue's dead letters; without a queue, of all.")
@_filters
def retry(words: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Put dead letters back into their queues, as first attempts. Each is there durably before it leaves here.

    The first word is a queue if there is one of that name. Without a queue, all queues are meant.

    \b
    Examples:
      leveret dead retry 01a20edbd8e54a6e8c4dd2c8a1f0b3c7
      leveret dead retry default --error ConnectionError
      leveret dead retry --all
    """
    _decide(words, lambda letters, queue, ids: letters.retry(queue, ids), "put back", everything=everything, **options)


@command.command()
@click.argument("words", metavar="[QUEUE] [ID]...", nargs=-1, shell_complete=complete_queue)
@click.option("--all", "everything", is_flag=True, help="All of the queue's dead letters; without a queue, of all.")
@_filters
def drop(words: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Delete dead letters for good.

    The first word is a queue if there is one of that name. Without a queue, all queues are meant.

    \b
    Examples:
      leveret dead drop 01a20edbd8e54a6e8c4dd2c8a1f0b3c7
      leveret dead drop default --older 7d
    """
    _decide(words, lambda letters, queue, ids: letters.drop(queue, ids), "deleted", everything=everything, **options)


class _Scope(msgspec.Struct, frozen=True):
    """Which queues and ids the words of a command mean."""

    queues: list[str]
    ids: tuple[str, ...]
    #: Whether the queues were named.
    named: bool


async def _scope(broker: Broker, words: Sequence[str], named: Sequence[str], known: Sequence[str]) -> _Scope:
    """The first word is a queue if there is such a one and none is named by an option."""
    if named or not words:
        return _Scope(await _queues(broker, named, known), tuple(words), bool(named))
    listed = [one.name for one in await broker.queues.stats([*known, words[0]])]
    if words[0] in listed:
        return _Scope([words[0]], tuple(words[1:]), named=True)
    return _Scope(listed, tuple(words), named=False)


async def _queues(broker: Broker, named: Sequence[str], known: Sequence[str]) -> list[str]:
    """Those that are named, each of which must exist; else all that there are. Raises QueueNotFound."""
    for name in named:
        await require(broker, name)
    return list(dict.fromkeys(named)) or [one.name for one in await broker.queues.stats(list(known))]


def _decide(
    words: Sequence[str],
    act: Callable[[DeadLetters, str, Sequence[str]], Awaitable[Sequence[str]]],
    done: str,
    *,
    everything: bool,
    queues: tuple[str, ...],
    app: str | None,
    url: str | None,
    **filters: Any,
) -> None:
    """Do it to those that match, in each queue that is meant, and tell how many there were."""
    found = target(app, url)
    if not words and not everything and _Filter(**filters).is_open:
        raise click.UsageError("say which: give IDs, a filter, or --all")

    async def decide(broker: Broker) -> list[str]:
        scope = await _scope(broker, words, queues, found.queues)
        chosen = _Filter(ids=scope.ids, **filters)
        if chosen.is_open and not everything:
            raise click.UsageError("say which: give IDs, a filter, or --all")
        changed: list[str] = []
        staying: list[str] = []
        for name in scope.queues:
            ids = [letter.envelope.id for letter in await _find(broker, name, chosen)]
            mine = await act(broker.dead_letters, name, ids) if ids or scope.named else []
            changed += mine
            staying += set(ids).difference(mine)
            if mine or scope.named:
                click.echo(f"{len(mine)} dead letter{'' if len(mine) == 1 else 's'} of queue {name!r} {done}")
        if not changed and not scope.named:
            click.echo(f"0 dead letters in {found.place} {done}")
        if staying:
            raise click.ClickException(
                f"{len(staying)} were not {done}: other tasks have their unique keys (see leveret unique list), "
                "or somebody else was first: " + ", ".join(map(in_line, sorted(staying)[:_MOST_NAMED]))
            )
        missing = [id_ for id_ in scope.ids if id_ not in changed]
        if missing:
            raise _not_found(scope, missing)
        return changed

    ask(found, decide)


def _not_found(scope: _Scope, missing: Sequence[str]) -> Exception:
    if not scope.named and len(missing) == len(scope.ids):
        hint = did_you_mean(missing[0], scope.queues) or "; leveret queues and leveret dead list show them"
        return QueueNotFound(f"there is no queue and no dead letter {missing[0]!r}{hint}")
    return click.ClickException(f"not among the dead letters that match: {', '.join(map(in_line, missing))}")


async def _find(broker: Broker, queue: str, chosen: _Filter, *, whole: bool = False) -> list[DeadLetter]:
    def select(letter: DeadLetter) -> DeadLetter | None:
        if not chosen.matches(letter):
            return None
        return letter if whole else _without_body(letter)

    return list(await broker.dead_letters.read(queue, limit=_MOST, select=select))


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


def _show(letters: Sequence[DeadLetter], *, with_queue: bool) -> None:
    """A row for each; in a narrow terminal the reason stands below."""
    from rich.padding import Padding
    from rich.text import Text

    shown = console()
    headings = ["id", *(["queue"] if with_queue else []), "task", "age", "attempt", "reason"]
    rows = [[Text(in_line(cell), overflow="fold") for cell in _cells(letter, headings)] for letter in letters]
    if shown.width >= _WIDE:
        all_of_it = table(headings, whole=("id",))
        for row in rows:
            all_of_it.add_row(*row)
        show_table(all_of_it)
        return
    head = [Text(heading, "bold") for heading in headings]
    _align([one[:-1] for one in (head, *rows)], shown.width)
    for *cells, reason in (head, *rows):
        shown.print(Text("  ").join(cells), Padding(reason, (0, 0, 0, 2)), sep="\n")


def _align(rows: Sequence[Sequence[Text]], width: int) -> None:
    """Have the cells stand below each other, where the terminal has room for that."""
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) > width:
        return
    for row in rows:
        for cell, wanted in zip(row, widths, strict=True):
            cell.align("left", wanted)


def _cells(letter: DeadLetter, headings: Sequence[str]) -> list[str]:
    envelope = letter.envelope
    cells = {
        "id": envelope.id,
        "queue": envelope.queue,
        "task": envelope.task or "-",
        "age": _age(letter.died_at),
        "attempt": str(envelope.attempt),
        "reason": letter.reason,
    }
    return [cells[heading] for heading in headings]
