"""``leveret enqueue``."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import click
import msgspec

from leveret.brokers import file_of
from leveret.cli.completing import complete_app, complete_queue, complete_task
from leveret.cli.durations import DURATION, MOMENT
from leveret.cli.options import loaded, url_option
from leveret.model import MAX_PRIORITY
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from leveret.client import App, Task

#: Nobody calls an option by a number.
_NEGATIVE = re.compile(r"-\.?\d")
#: Marks an argument that begins with a dash. No argument of a program can hold it.
_LITERAL = "\0"


class _Enqueue(click.Command):
    """Takes negative numbers as arguments, and says of other unknown options what to do about them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, self._marked(args))
        except click.NoSuchOption as error:
            hint = did_you_mean(error.option_name, valued_options(self)) or "."
            raise click.UsageError(
                f"No such option: {error.option_name}{hint} Write -- before arguments that begin with a dash.", ctx
            ) from None

    def _marked(self, args: list[str]) -> list[str]:
        """The arguments with the negative numbers marked, but for the values of options."""
        valued = valued_options(self)
        end = args.index("--") if "--" in args else len(args)
        marked = [
            _LITERAL + one if _NEGATIVE.match(one) and before not in valued else one
            for before, one in zip(["", *args], args[:end], strict=False)
        ]
        return [*marked, *args[end:]]


def valued_options(command: click.Command) -> set[str]:
    """Those that are followed by a value."""
    options = [one for one in command.params if isinstance(one, click.Option) and not one.is_flag]
    return {name for option in options for name in option.opts}


@click.command(cls=_Enqueue)
@click.argument("app", metavar="MODULE:APP", shell_complete=complete_app)
@click.argument("task", shell_complete=complete_task)
@click.argument("arguments", metavar="[ARG]...", nargs=-1, type=click.UNPROCESSED)
@click.option("--kwargs", metavar="JSON", default="{}", help="Keyword arguments, as a JSON object.")
@click.option("-q", "--queue", shell_complete=complete_queue, help="Instead of the task's own queue.")
@click.option("--delay", type=DURATION, help="Not before so long from now: seconds, or 30s, 5m, 2h, 1d.")
@click.option("--at", type=MOMENT, help="Not before then: 2026-01-31T08:00+01:00, with a time zone.")
@click.option("--expires", type=DURATION, help="Dead if it has not started so long from now.")
@click.option("--priority", type=click.IntRange(0, MAX_PRIORITY), help="The higher first; none is like 4.")
@click.option("--id", help="The task's id. One whose task is there is refused.")
@click.option("--id-for", type=DURATION, help="The id is taken for so long from now, though its task has ended.")
@click.option(
    "--on-conflict",
    type=click.Choice(("ignore", "raise")),
    help="Of an id, or a unique key, that is taken: print the id of the task that is there, or exit 1.",
)
@url_option
def command(app: str, task: str, arguments: tuple[str, ...], kwargs: str, url: str | None, **options: Any) -> None:
    """Enqueue one task and print its id.

    Each ARG is JSON (80, true, '[1, 2]'), else a string. A task that takes the raw body gets the one ARG as it is.
    After -- all are arguments, whatever they begin with.

    \b
    Examples:
      leveret enqueue tasks:app resize cat.png 80
      leveret enqueue tasks:app resize --kwargs '{"path": "cat.png", "width": 80}'
      leveret enqueue tasks:app send_invoice 42 --id invoice-42 --priority 9
      leveret enqueue tasks:app clean_up --id "clean-up-$(date +%F)" --id-for 1d --on-conflict ignore
      leveret enqueue tasks:app remind --delay 2h -- --all
    """
    application = loaded(app, url)
    found = application.registry.find(task, options["queue"] or "").options(**options)
    literal = [argument.removeprefix(_LITERAL) for argument in arguments]
    values = [argument.encode() for argument in literal] if found.signature.raw else [*map(_value, literal)]
    file = file_of(application.url)
    is_new = file is not None and not file.exists()
    click.echo(asyncio.run(_enqueue(application, found, values, _keywords(kwargs))))
    if is_new:
        click.echo(f"leveret: made the file {file}; a worker of another file does not see it", err=True)


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
