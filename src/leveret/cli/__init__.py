"""The command line. Each command is a module, imported when it is called; an error of the user's is one line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from leveret.cli.terminal import wants_no_style
from leveret.errors import AppNotLoaded, LeveretError
from leveret.model.printable import in_line, printable
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.client import Project

_COMMANDS = {
    "worker": ("leveret.cli.worker", "command", "Run the tasks of an application."),
    "enqueue": ("leveret.cli.enqueue", "command", "Enqueue one task from the command line."),
    "status": ("leveret.cli.status", "status", "Tell what has become of a task."),
    "result": ("leveret.cli.status", "result", "Print what a task returned."),
    "cancel": ("leveret.cli.status", "cancel", "Have a task not run, or end."),
    "queues": ("leveret.cli.queues", "command", "Show what is in the queues; pause, resume, purge, delete."),
    "tasks": ("leveret.cli.tasks", "command", "See which tasks wait in a queue."),
    "schedules": (
        "leveret.cli.schedules",
        "command",
        "Show what is enqueued by itself; pause, trigger, remove.",
    ),
    "limits": ("leveret.cli.limits", "command", "Show how much may run at once or start; change, pause."),
    "top": ("leveret.cli.top", "command", "Watch queues, workers and failures, and steer them."),
    "dead": ("leveret.cli.dead", "command", "Look at tasks that cannot or shall not run again."),
    "unique": ("leveret.cli.unique", "command", "See which unique keys are taken, and free one."),
    "relay": ("leveret.cli.outbox", "relay", "Publish the tasks that wait in a database's outbox."),
    "outbox": ("leveret.cli.outbox", "command", "Make a database's outbox, look at it, retry what is in it."),
    "dashboard": ("leveret.cli.dashboard", "command", "See and steer all of it in a browser."),
    "demo": ("leveret.cli.demo", "command", "See two workers share five tasks, one of them killed."),
}


class _Commands(click.Group):
    """Imports a command's module when the command is asked for, so that ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(None, "-V", "--version", package_name="leveret", message="%(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Leveret, a work queue on RabbitMQ or one SQLite file.

    The broker is the application's, or $LEVERET_URL, or the url of [tool.leveret] in pyproject.toml, or
    sqlite:///leveret.db. Options can be set there and in the environment too.

    \b
    Examples:
      leveret worker tasks:app --processes 2 --concurrency 10
      leveret enqueue tasks:app resize cat.png 80
      LEVERET_URL=amqp://guest:guest@localhost/ leveret queues -q default
    """
    if wants_no_style():
        context.color = False
    if context.invoked_subcommand is not None:
        context.default_map = _of_project(context.invoked_subcommand)


def _of_project(command: str) -> dict[str, Any]:
    """The options that pyproject.toml sets, for the command."""
    from leveret.client import OF_AN_APPLICATION, check, project

    try:
        found = project(Path.cwd())
    except OSError:  # the working directory was deleted
        return {}
    if not found.values:
        return {}
    from leveret.cli.worker import SETTINGS

    check(found, (*OF_AN_APPLICATION, *SETTINGS, "app", "dashboard"))
    dashboard = _of_dashboard(found)
    own = {name: value for name, value in found.values.items() if name in SETTINGS}
    app = {"app": found.values["app"]} if "app" in found.values else {}
    if command == "worker":
        return {command: {**app, **own, **({"queues": own["queue"]} if "queue" in own else {})}}
    if command == "dashboard":
        return {command: {**app, **dashboard}}
    # A command's defaults, and those of the commands below it.
    below = dict.fromkeys(
        ("list", "show", "set", "retry", "drop", "release", "next", "pause", "resume", "trigger", "remove"), app
    )
    return {command: {**app, **below}, **{f"queues {name}": app for name in ("pause", "resume", "purge", "delete")}}


def _of_dashboard(found: Project) -> dict[str, Any]:
    from leveret.errors import ConfigurationError

    table = found.values.get("dashboard", {})
    known = ("host", "port", "redact", "queue")
    if not isinstance(table, dict):
        raise ConfigurationError(f"{found.file}: tool.leveret.dashboard is {table!r}; it must be a table")
    for name in table:
        if name not in known:
            raise ConfigurationError(
                f"{found.file}: [tool.leveret.dashboard] has no setting {name!r}"
                f"{did_you_mean(name, known) or '; there are: ' + ', '.join(known)}"
            )
    return {**table, **({"queues": table["queue"]} if "queue" in table else {})}


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exits 1 with one line on standard error when something of the user's is wrong."""
    try:
        cli(arguments, prog_name="leveret")
    except LeveretError as error:
        if isinstance(error, AppNotLoaded) and error.traceback:
            click.echo(printable(error.traceback.rstrip()), err=True)
        click.echo(f"leveret: {in_line(str(error))}", err=True)
        sys.exit(1)
