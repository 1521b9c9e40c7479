"""``leveret top``: what the queues and the workers do now, and keys to steer them."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import click

from leveret.cli.options import app_option, target, url_option
from leveret.cli.top.figures import Collector, Figures
from leveret.cli.top.keys import keyboard
from leveret.cli.top.plain import block
from leveret.cli.top.screen import jumped, moved, picture
from leveret.errors import LeveretError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from rich.live import Live

    from leveret.brokers import Broker


@click.command()
@app_option
@url_option
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Print what there is now, and end.")
def command(app: str | None, url: str | None, interval: float, *, once: bool) -> None:
    """Watch queues, workers and failures; pause and resume queues, cancel tasks, retry dead ones. ? shows the keys.

    Where standard output is not a terminal, plain lines are printed, a block each interval.

    \b
    Examples:
      leveret top
      leveret top --app tasks:app
      leveret top --once --url amqp://guest:guest@localhost/
    """
    found = target(app, url)
    broker, queues = found.broker, found.queues
    is_live = sys.stdin.isatty() and sys.stdout.isatty() and not once
    asyncio.run(_watch(broker, queues, interval) if is_live else _print(broker, queues, interval, once=once))


async def _print(broker: Broker, queues: Sequence[str], interval: float, *, once: bool) -> None:
    try:
        if once:
            await broker.queues.stats(list(queues))  # gives up when nobody answers; following waits for the broker
        async with Collector(broker, queues) as collector:
            figures = await collector.look()
            click.echo(block(figures))
            while not once:
                await asyncio.sleep(interval)
                figures = await collector.look()
                click.echo("\n" + block(figures))
    finally:
        await broker.close()


async def _watch(broker: Broker, queues: Sequence[str], interval: float) -> None:
    from rich.live import Live

    from leveret.cli.top.screen import console

    async with AsyncExitStack() as stack:
        stack.push_async_callback(broker.close)
        collector = await stack.enter_async_context(Collector(broker, queues))
        figures = await collector.look()
        keys = stack.enter_context(keyboard(sys.stdin.fileno()))
        live = stack.enter_context(
            Live(console=console(), screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        )
        await _Top(broker, collector, figures, live).run(keys, interval)


class _Top:
    """The live view: what is shown, and what the keys do."""

    def __init__(self, broker: Broker, collector: Collector, figures: Figures, live: Live) -> None:
        self._broker = broker
        self._collector = collector
        self._figures = figures
        self._live = live
        self._cursor = moved(None, figures, 0)
        self._message = ""
        self._shows_help = False
        self._quit = asyncio.Event()
        self._acts: set[asyncio.Task[None]] = set()

    async def run(self, keys: asyncio.Queue[str], interval: float) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._quit.set)
        loop.add_signal_handler(signal.SIGWINCH, self._draw)
        self._draw()
        works = [loop.create_task(self._look(interval)), loop.create_task(self._hear(keys))]
        end = loop.create_task(self._quit.wait())
        try:
            await asyncio.wait([*works, end], return_when=asyncio.FIRST_COMPLETED)
            for work in works:
                if work.done():
                    work.result()
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            for task in (*works, end, *self._acts):
                task.cancel()
            await asyncio.gather(*works, end, *self._acts, return_exceptions=True)

    async def _look(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                self._figures = await self._collector.look()
            except LeveretError as error:
                self._message = str(error)
            self._cursor = moved(self._cursor, self._figures, 0)
            self._draw()

    async def _hear(self, keys: asyncio.Queue[str]) -> None:
        acts: dict[str, Callable[[], object]] = {
            "q": self._quit.set,
            "?": self._toggle_help,
            "up": lambda: self._move(-1),
            "k": lambda: self._move(-1),
            "down": lambda: self._move(1),
            "j": lambda: self._move(1),
            "tab": self._jump,
            "p": self._pause,
            "r": self._resume,
            "t": self._retry,
            "c": self._cancel,
        }
        while True:
            key = await keys.get()
            self._message = ""
            if key == "escape":
                self._shows_help = False
            acts.get(key, lambda: None)()
            self._draw()

    def _toggle_help(self) -> None:
        self._shows_help = not self._shows_help

    def _move(self, steps: int) -> None:
        self._cursor = moved(self._cursor, self._figures, steps)

    def _jump(self) -> None:
        """To the first row of the next list that has any."""
        self._cursor = jumped(self._cursor, self._figures)

    def _pause(self) -> None:
        self._change_queue(self._broker.queues.pause, "is paused")

    def _resume(self) -> None:
        self._change_queue(self._broker.queues.resume, "goes on")

    def _change_queue(self, change: Callable[[str], Coroutine[object, object, None]], done: str) -> None:
        if self._cursor is None or self._cursor.kind != "queue":
            self._message = "move to a queue first"
            return
        queue = self._cursor.key

        async def act() -> str:
            await change(queue)
            return f"queue {queue!r} {done}"

        self._begin(act)

    def _retry(self) -> None:
        letter = self._figures.failure(self._cursor.key) if self._cursor and self._cursor.kind == "failure" else None
        if letter is None or letter.state != "dead":
            self._message = "move to a dead task first"
            return
        queue, id_ = letter.queue, letter.id

        async def act() -> str:
            found = await self._broker.dead_letters.retry(queue, [id_])
            return f"task {id_} is {'back in its queue' if found else 'no dead letter any more'}"

        self._begin(act)

    def _cancel(self) -> None:
        failure = self._figures.failure(self._cursor.key) if self._cursor and self._cursor.kind == "failure" else None
        is_waiting = failure is not None and failure.state == "retrying"
        if self._cursor is None or not (self._cursor.kind == "run" or is_waiting):
            self._message = "move to a task that runs, or is to be tried again, first"
            return
        id_ = self._cursor.key

        async def act() -> str:
            status = await self._broker.control.cancel(id_)
            if status is None or not status.is_final:
                return f"task {id_} is told to end"
            return f"task {id_} {'is cancelled' if status.state == 'cancelled' else 'has ended already'}"

        self._begin(act)

    def _begin(self, work: Callable[[], Coroutine[object, object, str]]) -> None:
        async def act() -> None:
            try:
                self._message = await work()
                with suppress(LeveretError):
                    self._figures = await self._collector.look()
            except LeveretError as error:
                self._message = str(error)
            self._draw()

        self._message = "..."
        task = asyncio.get_running_loop().create_task(act())
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)

    def _draw(self) -> None:
        width, height = self._live.console.size
        shown = picture(
            self._figures, self._cursor, self._message, width=width, height=height, shows_help=self._shows_help
        )
        self._live.update(shown, refresh=True)
