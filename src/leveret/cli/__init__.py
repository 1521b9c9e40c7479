"""The command line. Each command is a module, imported when it is called; an error of the user's is one line."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

import click

from leveret.errors import LeveretError
from leveret.visible import in_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMMANDS = {
    "worker": ("leveret.cli.worker", "command", "Run the tasks of an application."),
    "enqueue": ("leveret.cli.enqueue", "command", "Enqueue one task from the command line."),
    "status": ("leveret.cli.status", "status", "Tell what has become of a task."),
    "result": ("leveret.cli.status", "result", "Print what a task returned."),
    "cancel": ("leveret.cli.status", "cancel", "Have a task not run, or end."),
    "queues": ("leveret.cli.queues", "command", "Show what is ready, running and dead; pause and resume."),
    "top": ("leveret.cli.top", "command", "Watch queues, workers and failures, and steer them."),
    "dead": ("leveret.cli.dead", "command", "Look at tasks that cannot or shall not run again."),
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

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leveret", message="%(version)s")
def cli() -> None:
    """Leveret, a work queue on RabbitMQ or one SQLite file.

    The broker is the application's, or $LEVERET_URL, or sqlite:///leveret.db.

    \b
    Examples:
      leveret worker tasks:app --processes 2 --concurrency 10
      leveret enqueue tasks:app resize cat.png 80
      LEVERET_URL=amqp://guest:guest@localhost/ leveret queues -q default
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Exits 1 with one line on standard error when something of the user's is wrong."""
    try:
        cli(arguments, prog_name="leveret")
    except LeveretError as error:
        click.echo(f"leveret: {in_line(str(error))}", err=True)
        sys.exit(1)
