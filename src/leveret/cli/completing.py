"""What a shell offers at Tab: applications, tasks, queues, schedules and limits. It says nothing, and never fails."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import click

    from leveret.brokers import Broker
    from leveret.client import App

T = TypeVar("T")

#: So long may a broker take to tell its queues (seconds).
_TIMEOUT = 2.0
#: So many files are looked through, none larger than that (bytes).
_MOST_FILES = 500
_LARGEST = 200_000
#: ``app = App(...)`` or ``app: App = leveret.App(...)`` at the top level of a module.
_APP = re.compile(r"^(\w+)(?:\s*:[^=\n]+)?\s*=\s*(?:\w+\.)?App\(", re.MULTILINE)
_HIDDEN = {"node_modules", "site-packages", "__pycache__", "build", "dist"}


def complete_app(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Those that the files here and one folder below seem to have: nothing is imported for that."""
    del context, parameter
    return sorted(one for one in _quietly(lambda: list(_apps(Path())), list[str]()) if one.startswith(incomplete))


def complete_task(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    del parameter
    app = _quietly(lambda: _app(context), None)
    return [] if app is None else [task.name for task in app.tasks if task.name.startswith(incomplete)]


def complete_queue(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The application's, and those that the broker can list."""
    del parameter
    return sorted(one for one in _quietly(lambda: _queues(context), set[str]()) if one.startswith(incomplete))


def complete_schedule(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Those of the broker that are not named yet."""
    named = context.params.get(parameter.name or "") or ()
    found = _quietly(lambda: _schedules(context), list[str]())
    return sorted(one for one in found if one.startswith(incomplete) and one not in named)


def complete_limit(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Those of the broker that are not named yet."""
    named = context.params.get(parameter.name or "") or ()
    found = _quietly(lambda: _limits(context), list[str]())
    return sorted(one for one in found if one.startswith(incomplete) and one not in named)


def _apps(folder: Path) -> Iterator[str]:
    files = [*folder.glob("*.py"), *folder.glob("*/*.py"), *folder.glob("src/*/*.py")]
    for file in files[:_MOST_FILES]:
        parts = file.parts
        if any(part.startswith(".") or part in _HIDDEN for part in parts) or file.stat().st_size > _LARGEST:
            continue
        for name in _APP.findall(file.read_text(errors="replace")):
            is_package = len(parts) == 1 or (file.parent / "__init__.py").exists()
            module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            yield f"{module if is_package and parts[0] != 'src' else file}:{name}"


def _app(context: click.Context) -> App | None:
    from leveret.cli.options import loaded

    # Where an option stands at the end without its value yet, click has not come to the arguments.
    words = [word for word in context.args if ":" in word]
    reference = context.params.get("app") or next(iter(words), None)
    return None if reference is None else loaded(reference, context.params.get("url"))


def _queues(context: click.Context) -> set[str]:
    app = _app(context)
    known = {queue.name for queue in app.queues} if app is not None else set()

    async def listed(broker: Broker) -> set[str]:
        return {one.name for one in await broker.queues.stats(sorted(known))}

    with suppress(Exception):
        return known | _asked(context, app, listed)
    return known


def _schedules(context: click.Context) -> list[str]:
    async def listed(broker: Broker) -> list[str]:
        return [row.name for row in await broker.schedules.read()]

    return _asked(context, _app(context), listed)


def _limits(context: click.Context) -> list[str]:
    async def listed(broker: Broker) -> list[str]:
        return [one.row.name for one in await broker.limits.read()]

    return _asked(context, _app(context), listed)


def _asked(context: click.Context, app: App | None, question: Callable[[Broker], Awaitable[T]]) -> T:
    """What the broker answers, if it does so at once."""
    from leveret.brokers import connect
    from leveret.client import resolve_url

    url = resolve_url(context.params.get("url")) if app is None else app.url

    async def answer() -> T:
        broker = connect(url, timeout=_TIMEOUT)
        try:
            async with asyncio.timeout(_TIMEOUT):
                return await question(broker)
        finally:
            await broker.close()

    return asyncio.run(answer())


def _quietly(question: Callable[[], T], nothing: T) -> T:
    """What the user's modules print would end up in the command line."""
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return question()
    except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, there is nothing to offer
        return nothing
    finally:
        logging.disable(logging.NOTSET)
