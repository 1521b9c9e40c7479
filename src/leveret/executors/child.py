"""The child process: imports the user's code, runs jobs, and never sees a broker.

Started by `spawn` as ``python -m leveret.executors.child SOCKET LIFELINE TICKETS``. It ends when its worker does: a
thread that does nothing else watches the lifeline, so that even a blocked event loop cannot outlive its worker. The
same thread tells the worker of an event loop that does not turn.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from leveret import execution, loops
from leveret.app import App, load_app
from leveret.errors import AppNotLoaded
from leveret.execution import Runner
from leveret.executors import Blocks, Job, Manifest
from leveret.executors.in_process import Crew
from leveret.executors.wire import Begin, Cancel, NotLoaded, Pipe, Ready, Run, ToChild, Turns, frame, read_begin
from leveret.model import shorten

if TYPE_CHECKING:
    from collections.abc import Sequence

#: How often the watch looks (seconds).
_LOOK = 0.25
#: An event loop that has not turned for this long is reported (seconds).
BLOCKED = 1.0
#: A stack longer than this is cut in the middle (characters).
_STACK = 8_192
#: So much do all suspects have together, but each so much that its ends can be read (characters).
_STACKS = 65_536
_LEAST_STACK = 256


class Watch:
    """A thread that sees what the event loop cannot: that its worker is gone, and that it does not turn itself."""

    def __init__(self, lifeline: socket.socket) -> None:
        self._lifeline = lifeline
        self._crew: Crew | None = None
        self._asked: float | None = None
        self._told = False
        #: The rest of what it has told, when the worker has not read the beginning.
        self._unsent = b""
        threading.Thread(target=self._run, name="leveret-watch", daemon=True).start()

    def over(self, crew: Crew) -> None:
        """Watch the running loop, which works for that crew, too."""
        self._loop = asyncio.get_running_loop()
        self._crew = crew

    def _run(self) -> None:
        self._lifeline.settimeout(_LOOK)
        while True:
            try:
                if not self._lifeline.recv(1):
                    os._exit(1)
            except TimeoutError:
                self._look()
            except OSError:
                os._exit(1)

    def _look(self) -> None:
        self._send()
        if self._unsent or self._crew is None or self._loop.is_closed():
            return
        # Read once: the loop may answer at any moment.
        asked, now = self._asked, time.monotonic()
        if asked is None:
            if self._told:
                self._told = False
                self._tell([Turns()])
            if self._crew.running:
                self._asked = now
                self._loop.call_soon_threadsafe(self._answer)
        elif now - asked > BLOCKED and not self._told:
            self._told = True
            suspects = self._suspects()
            stack = shorten(_stack_of_main_thread(), longest_stack(len(suspects)))
            self._tell([Blocks(job.key, now - asked, stack) for job in suspects])

    def _answer(self) -> None:
        self._asked = None

    def _tell(self, messages: Sequence[Blocks | Turns]) -> None:
        self._unsent += frame(messages)
        self._send()

    def _send(self) -> None:
        """As much as the worker takes now. That it is gone the next read finds out."""
        with suppress(OSError):
            while self._unsent:
                self._unsent = self._unsent[self._lifeline.send(self._unsent) :]

    def _suspects(self) -> list[Job]:
        """The job that the loop is in; all that run, when it is in an asyncio task that one of them made."""
        assert self._crew is not None
        running = dict(self._crew.running)
        current = asyncio.current_task(self._loop)
        return [running[current]] if current in running else list(running.values())


def _stack_of_main_thread() -> str:
    """From the task's own function on, as a traceback prints it."""
    at = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - documented, for debuggers
    frames = traceback.extract_stack(at)
    ours = [number for number, summary in enumerate(frames) if summary.filename == execution.__file__]
    return "".join(traceback.format_list(frames[ours[-1] + 1 if ours else 0 :]))


def longest_stack(suspects: int) -> int:
    """Of each of so many, all of which have the same (characters)."""
    return min(_STACK, max(_LEAST_STACK, _STACKS // max(1, suspects)))


async def serve(connection: socket.socket, app: App, begin: Begin, watch: Watch, tickets: int) -> None:
    """Run jobs until the worker closes its end."""
    pipe = await Pipe[ToChild].open(connection, ToChild)

    def admit(wanted: int) -> int:
        """A ticket for each job that may start; the worker takes out those of jobs that it takes back."""
        try:
            return len(os.read(tickets, wanted))
        except BlockingIOError:
            return 0

    crew = Crew(Runner(app, concurrency=begin.concurrency), concurrency=begin.concurrency, admit=admit)
    crew.report_to(pipe.write)
    watch.over(crew)

    def hear(batch: list[ToChild]) -> None:
        crew.submit([message.job for message in batch if isinstance(message, Run)])
        crew.cancel([key for message in batch if isinstance(message, Cancel) for key in message.keys])

    pipe.hear = hear
    pipe.write([Ready(Manifest.of(app), _sources(begin.app))])
    await pipe.ended
    await crew.stop()
    await app.close()


def _sources(reference: str) -> list[str]:
    """The files imported from below the application's folder and the working directory, but for what is installed."""
    module = sys.modules.get(reference.rpartition(":")[0])
    name = getattr(module, "__file__", None) or reference.rpartition(":")[0]
    folders = (f"{Path.cwd()}{os.sep}", f"{Path(name).resolve().parent}{os.sep}")
    installed = ("/site-packages/", "/dist-packages/", f"{Path(os.__file__).parent}{os.sep}")
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    ours = {file for file in files if isinstance(file, str) and file.startswith(folders)}
    return sorted(file for file in ours if not any(part in file for part in installed))


def _ignore(*_: object) -> None:
    """A stop is the worker's to decide. A handler, not SIG_IGN, which the task's own subprocesses would inherit."""


def main() -> None:
    connection, lifeline = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    tickets = int(sys.argv[3])
    os.set_blocking(tickets, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A line is one write, or those of several children run into each other where PYTHONUNBUFFERED is set.
            stream.reconfigure(line_buffering=True, write_through=False)
    watch = Watch(lifeline)
    begin = read_begin(connection)
    if begin is None:
        return
    try:
        app = load_app(begin.app)
    except AppNotLoaded as error:
        connection.sendall(frame([NotLoaded(str(error))]))
        return
    if begin.logs is not None:
        begin.logs.set_up()
    if begin.url is not None:
        app.connect_to(begin.url)
    loops.run(serve(connection, app, begin, watch, tickets), begin.loop)


if __name__ == "__main__":
    main()
