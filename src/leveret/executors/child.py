"""The child process: imports the user's code, runs jobs, and never sees a broker.

Started by `spawn` as ``python -m leveret.executors.child SOCKET LIFELINE TICKETS``. It ends when its worker does: a
thread that does nothing else watches the lifeline, so that even a blocked event loop cannot outlive its worker. The
same thread tells the worker of an event loop that does not turn.

What a task forks is the task's: it has none of this process's signal handling and connections (`forking`), and what a
task starts ends with this process (`session`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
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

import leveret
from leveret.client import App, load_app
from leveret.errors import AppNotLoaded
from leveret.executors import attempt as execution
from leveret.executors import loops, session
from leveret.executors.attempt import JobRunner, Runner
from leveret.executors.base import Blocks, Finished, Manifest, RunRequest
from leveret.executors.forking import Forks
from leveret.executors.lifespan import Lifespan
from leveret.executors.vitals import Vitals
from leveret.executors.wire import (
    Begin,
    Cancel,
    NotLoaded,
    Pipe,
    Ready,
    Recall,
    Run,
    ToChild,
    Turns,
    Unfit,
    encoded,
    read_begin,
)
from leveret.model import DeadLettered, Retrying, shorten
from leveret.observe import write

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any

    from leveret.executors.base import Report

log = logging.getLogger("leveret.executors")

#: How often the watch looks (seconds).
_LOOK = 0.25
#: An event loop that has not turned for this long is reported (seconds).
BLOCKED = 1.0
#: A stack longer than this is cut in the middle (characters).
_STACK = 8_192
#: So much do all suspects have together, but each so much that its ends can be read (characters).
_STACKS = 65_536
_LEAST_STACK = 256
#: What tasks have started on the event loop and left may take so long to end, at a stop (seconds).
SHUTDOWN_TIMEOUT = 1.0
_MOST_NAMED = 5
_DRIVERS = (
    *(f"{Path(file).parent}{os.sep}" for file in (asyncio.__file__, leveret.__file__)),
    *(f"{os.sep}{name}{os.sep}" for name in ("aio_pika", "aiormq")),
)


class Watch:
    """A thread that sees what the event loop cannot: that its worker is gone, and that it does not turn itself."""

    def __init__(self, lifeline: socket.socket) -> None:
        self._lifeline = lifeline
        self._jobs: JobRunner | None = None
        self._asked: float | None = None
        self._told = False
        self._vitals: Vitals | None = None
        self._checked = 0
        self._is_unfit = False
        #: The rest of what it has told, when the worker has not read the beginning.
        self._unsent = b""
        threading.Thread(target=self._run, name="leveret-watch", daemon=True).start()

    def over(self, jobs: JobRunner, vitals: Vitals) -> None:
        """Watch the running loop, which these jobs run on, too."""
        self._loop = asyncio.get_running_loop()
        self._vitals = vitals
        self._jobs = jobs

    def end_if_alone(self) -> None:
        """At the end of this process: with all that it has started, if the reason is that its worker is gone."""
        if select.select([self._lifeline], [], [], 0)[0]:
            _end_at_once()

    def _run(self) -> None:
        self._lifeline.settimeout(_LOOK)
        try:
            while True:
                try:
                    if not self._lifeline.recv(1):
                        break
                except TimeoutError:
                    self._look()
        finally:
            # Also where it can't watch any more, for want of memory perhaps.
            _end_at_once()

    def _look(self) -> None:
        self._send()
        self._look_at_vitals()
        if self._unsent or self._jobs is None or self._loop.is_closed():
            return
        # Read once: the loop may answer at any moment.
        asked, now = self._asked, time.monotonic()
        if asked is None:
            if self._told:
                self._told = False
                self._tell([Turns()])
            if self._jobs.running:
                self._asked = now
                self._loop.call_soon_threadsafe(self._answer)
        elif now - asked > BLOCKED and not self._told:
            self._told = True
            suspects = self._suspects()
            stack = shorten(_stack_of_main_thread(), longest_stack(len(suspects)))
            self._tell([Blocks(job.key, now - asked, stack) for job in suspects])

    def _look_at_vitals(self) -> None:
        if self._jobs is None or self._vitals is None or self._is_unfit:
            return
        # A thread that dies of want of memory while it begins has the loop wait for it for ever: nothing finishes then.
        asked = self._asked
        is_blocked = asked is not None and time.monotonic() - asked > BLOCKED
        if self._checked == self._jobs.finished and not is_blocked:
            return
        self._checked = self._jobs.finished
        fault = self._vitals.fault()
        if fault is not None:
            self._is_unfit = True
            self._tell([Unfit(fault)])

    def _answer(self) -> None:
        self._asked = None

    def _tell(self, messages: Sequence[Blocks | Turns | Unfit]) -> None:
        self._unsent += encoded(messages)
        self._send()

    def _send(self) -> None:
        """As much as the worker takes now. That it is gone the next read finds out."""
        with suppress(OSError):
            while self._unsent:
                self._unsent = self._unsent[self._lifeline.send(self._unsent) :]

    def _suspects(self) -> list[RunRequest]:
        """The job that the loop is in; all that run, when it is in an asyncio task that one of them made."""
        assert self._jobs is not None
        running = dict(self._jobs.running)
        current = asyncio.current_task(self._loop)
        return [running[current]] if current in running else list(running.values())


def _stack_of_main_thread() -> str:
    """From the task's own function on, as a traceback prints it."""
    at = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - documented, for debuggers
    frames = traceback.extract_stack(at)
    ours = [number for number, summary in enumerate(frames) if summary.filename == execution.__file__]
    return "".join(traceback.format_list(frames[ours[-1] + 1 if ours else 0 :]))


def _end_at_once() -> None:
    """Its worker is gone, so another one may run the tasks already: it ends with all that they started."""
    session.end_own()
    os._exit(1)


def longest_stack(suspects: int) -> int:
    """Of each of so many, all of which have the same (characters)."""
    return min(_STACK, max(_LEAST_STACK, _STACKS // max(1, suspects)))


async def serve(connection: socket.socket, app: App, begin: Begin, watch: Watch, tickets: int, forks: Forks) -> None:
    """Run jobs within the application's lifespan until the worker closes its end."""
    forks.loop = asyncio.get_running_loop()
    pipe = await Pipe[ToChild].open(connection, ToChild)
    lifespan = Lifespan(app)
    try:
        state = await lifespan.enter()
    except AppNotLoaded as error:
        pipe.write([NotLoaded(str(error), error.traceback)])
        pipe.close()
        await pipe.ended
        await app.close()
        return

    def admit(wanted: int) -> int:
        """A ticket for each job that may start; the worker takes out those of jobs that it takes back."""
        try:
            return len(os.read(tickets, wanted))
        except BlockingIOError:
            return 0

    jobs = JobRunner(Runner(app, concurrency=begin.concurrency), concurrency=begin.concurrency, admit=admit)
    jobs.run_with(state, lifespan.context)
    vitals = Vitals()
    watch.over(jobs, vitals)

    def tell(reports: Sequence[Report]) -> None:
        """A failure may be another task's doing, which the worker must know first; else the watch finds that out.

        But without memory this process may end at the next message, and be unable to say anything any more.
        """
        fault = vitals.fault() if vitals.lacks_memory() or any(map(_has_failed, reports)) else None
        pipe.write(reports if fault is None else [Unfit(fault), *reports])

    jobs.report_to(tell)

    def hear(batch: list[ToChild]) -> None:
        jobs.submit([job for message in batch if isinstance(message, Run) for job in message.jobs])
        jobs.cancel([key for message in batch if isinstance(message, Cancel) for key in message.keys])
        if any(isinstance(message, Recall) for message in batch):
            jobs.recall()

    def broke(error: AppNotLoaded) -> None:
        """What it gave to the tasks is closed: the worker has them run elsewhere."""
        write(log, logging.ERROR, "%s", error, traceback=error.traceback)
        pipe.write([Unfit("its lifespan has ended")])

    lifespan.broke = broke
    pipe.hear = hear
    not_tasks_own = asyncio.all_tasks()
    pipe.write([Ready(Manifest.of(app, begin.app), _sources(begin.app), app.lifespan is not None)])
    await pipe.ended
    if pipe.broken is not None:
        log.error("ends, as something has read what its worker wrote to it, or written into it: %s", pipe.broken)
    not_tasks_own |= jobs.running.keys()
    await jobs.stop()
    left = [task for task in asyncio.all_tasks() - not_tasks_own if not _is_a_drivers(task)]
    if left:
        await asyncio.wait(left, timeout=SHUTDOWN_TIMEOUT)
    await lifespan.leave(begin.stop_timeout)
    _warn_of(left)
    await app.close()


def _warn_of(left: Collection[asyncio.Task[Any]]) -> None:
    """Say which asyncio tasks that tasks have started and not awaited have not ended: they are cancelled now."""
    names = [shorten(repr(task.get_coro()), 200) for task in left if not task.done()]
    if names:
        log.warning(
            "%d asyncio tasks that tasks started and did not await are cancelled, as their process ends: %s; "
            "await them, in a TaskGroup for example, or make them tasks of their own",
            len(names),
            ", ".join(names[:_MOST_NAMED]),
        )


def _is_a_drivers(task: asyncio.Task[Any]) -> bool:
    """Whether it is what an enqueue of a task's has started: it ends with the application's connections."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is None or any(part in code.co_filename for part in _DRIVERS)


def _has_failed(report: Report) -> bool:
    return isinstance(report, Finished) and isinstance(report.outcome, (Retrying, DeadLettered))


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
    numbers = [int(number) for number in sys.argv[1:4]]
    for number in numbers:
        os.set_inheritable(number, False)  # noqa: FBT003 - its only parameter
    connection, lifeline = (socket.socket(fileno=number) for number in numbers[:2])
    tickets = numbers[2]
    os.set_blocking(tickets, False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, _ignore)
    forks = Forks(numbers, before, _ignore)
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
        connection.sendall(encoded([NotLoaded(str(error), error.traceback)]))
        return
    if begin.logs is not None:
        begin.logs.set_up()
    if begin.url is not None:
        app.client.connect_to(begin.url)
    gc.collect()
    gc.freeze()  # what is imported stays: the collector need not look through it again and again
    loops.run(serve(connection, app, begin, watch, tickets, forks), begin.loop)
    watch.end_if_alone()


if __name__ == "__main__":
    main()
