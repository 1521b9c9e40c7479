"""``leveret demo``: the work-queue tutorial, live, with a worker killed in mid-task."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import click

from leveret.brokers import absolute
from leveret.cli.demo_worker import app, work

_MESSAGES = ("First message.", "Second message..", "Third message...", "Fourth message....", "Fifth message.....")
#: The worker that receives it is killed while it works on it.
_FATAL = "Fourth message...."
_COLOURS = ("cyan", "magenta")
#: The whole demo takes about ten seconds; it gives up after (seconds).
_PATIENCE = 60.0


@click.command()
@click.option(
    "--url",
    metavar="URL",
    callback=lambda _context, _option, url: url and absolute(url),
    help="Run it on this broker instead of a temporary SQLite file.",
)
def command(url: str | None) -> None:
    """See two workers share five tasks; one worker is killed in mid-task, and the other takes its task over.

    \b
    Examples:
      leveret demo
      leveret demo --url amqp://guest:guest@localhost/
    """
    with tempfile.TemporaryDirectory(prefix="leveret-demo-") as folder:
        asyncio.run(_demo(url or f"sqlite:///{Path(folder) / 'demo.db'}"))


async def _demo(url: str) -> None:
    app.client.connect_to(url)
    lines: asyncio.Queue[tuple[_Worker, str]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(_Worker(name, url, lines)) for name in ("worker 1", "worker 2")]
        stack.push_async_callback(app.close)
        try:
            async with asyncio.timeout(_PATIENCE):
                await _ready(lines, len(workers))
                await _send()
                await _watch(lines)
        except TimeoutError:
            raise click.ClickException(f"the demo did not end within {_PATIENCE:g} s") from None
    click.echo()
    click.echo("5 tasks sent, 5 done, none lost, though a worker was killed.")
    click.echo("Next: examples/tutorial has the programs, examples/thumbnails a real job.")


async def _ready(lines: asyncio.Queue[tuple[_Worker, str]], count: int) -> None:
    for _ in range(count):
        worker, line = await lines.get()
        worker.show(line)


async def _send() -> None:
    for message in _MESSAGES:
        await work.enqueue(message.encode())
        click.echo(f"producer | [x] Sent {message!r}")


async def _watch(lines: asyncio.Queue[tuple[_Worker, str]]) -> None:
    done: set[str] = set()
    killed = False
    while len(done) < len(_MESSAGES):
        worker, line = await lines.get()
        worker.show(line)
        if "Done" in line:
            done.add(line)
        elif _FATAL in line and not killed:
            killed = True
            await asyncio.sleep(0.5)
            click.secho(f"       $ kill -9 {worker.pid}   # {worker.name}, in the middle of {_FATAL!r}", bold=True)
            worker.kill()


class _Worker:
    """A worker process of the demo's, its output read line by line."""

    def __init__(self, name: str, url: str, lines: asyncio.Queue[tuple[_Worker, str]]) -> None:
        self.name = name
        self._url = url
        self._lines = lines

    async def __aenter__(self) -> _Worker:
        # Not as an argument, which every user of the machine could read.
        environment = {**os.environ, "LEVERET_URL": self._url}
        command = (sys.executable, "-m", "leveret.cli.demo_worker")
        self._process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        await self._process.wait()
        await self._reading

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def show(self, line: str) -> None:
        click.echo(click.style(self.name, fg=_COLOURS[self.name.endswith("2")]) + f" |{line}")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            await self._lines.put((self, line.decode().rstrip("\n")))
