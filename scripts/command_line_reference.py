"""Writes the commands and their options into docs/reference/command-line.md.

They are read from the click commands, so the page shows what ``--help`` shows. Run it when an option has changed, or
``tests/unit/test_docs.py`` fails: ``.venv/bin/python scripts/command_line_reference.py``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

import click

from leveret.cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parents[1] / "docs/reference/command-line.md"
BEGIN = "<!-- Written by scripts/command_line_reference.py from here -->\n"
END = "<!-- to here -->\n"


def updated(page: str) -> str:
    """The page with its marked part written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{''.join(map(_section, commands(cli, 'leveret')))}{END}{after}"


def commands(group: click.Command, name: str) -> Iterator[click.Context]:
    """A context for each command below, in the order of the help."""
    for word, command in _below(group).items():
        context = click.Context(command, info_name=f"{name} {word}", show_default=True)
        if not isinstance(command, click.Group):
            yield context
        yield from commands(command, f"{name} {word}")


def _below(command: click.Command) -> dict[str, click.Command]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        found = {word: command.get_command(context, word) for word in command.list_commands(context)}
        return {word: one for word, one in found.items() if one is not None}
    below: dict[str, click.Command] = getattr(command, "below", {})  # those of ``leveret queues``
    return below


def _section(context: click.Context) -> str:
    command = context.command
    usage = " ".join([context.info_name or "", *command.collect_usage_pieces(context)])
    options = [one for one in command.params if isinstance(one, click.Option)]
    options.sort(key=lambda one: one.name in ("app", "url"))  # those that most commands have come last
    rows = [_row(option, context) for option in options]
    parts = [
        f"### {context.info_name}",
        f"```text\n{usage}\n```",
        *_help(command.help or ""),
        "\n".join(["| option | value | default | what it does |", "|---|---|---|---|", *rows]) if rows else "",
    ]
    return "".join(f"{part}\n\n" for part in parts if part)


def _help(text: str) -> Iterator[str]:
    """The paragraphs; those that click shall not wrap are examples."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            lines = [line.strip() for line in paragraph.splitlines()[2:]]
            yield "\n".join(["```console", *(f"$ {line}" for line in lines), "```"])
        else:
            yield " ".join(paragraph.split())


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    default = option.get_help_extra(context).get("default", "")
    if isinstance(option.default, float):
        default = f"{option.default:g}"
    about = f"{option.help or ''} {f'Environment: `{option.envvar}`.' if option.envvar else ''}".strip()
    return f"| {names} | {_value(option, context)} | {default and f'`{default}`'} | {about} |"


def _value(option: click.Option, context: click.Context) -> str:
    """What follows the option."""
    kind = option.type
    if option.is_flag:
        return ""
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, (click.IntRange, click.FloatRange)):
        word = option.metavar or ("INTEGER" if isinstance(kind, click.IntRange) else "NUMBER")
        return f"`{word}`, " + (f"at least {kind.min}" if kind.max is None else f"{kind.min} to {kind.max}")
    word = option.metavar or (kind.name if "|" in kind.name else option.make_metavar(context))
    return ", ".join(f"`{one}`" for one in word.split("|"))


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
