"""The child process: imports the user's code, runs jobs, and never sees a broker.

Started by `processes` as ``python -m leveret.executors.child SOCKET LIFELINE``. It ends when its worker does: a
thread that does nothing else watches the lifeline, so that even a blocked event loop cannot outlive its worker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from io import TextIOWrapper

from leveret.app import load_app
from leveret.errors import AppNotLoaded
from leveret.execution import Runner
from leveret.executors import Manifest
from leveret.executors.in_process import Crew
from leveret.executors.wire import Begin, NotLoaded, Pipe, Ready, Run, ToChild


async def serve(connection: socket.socket) -> None:
    """Run jobs until the worker closes its end."""
    reader, writer = await asyncio.open_connection(sock=connection)
    pipe: Pipe[ToChild] = Pipe(reader, writer, ToChild)
    for begin in await pipe.read():
        if isinstance(begin, Begin):
            await _work(begin, pipe)
    pipe.close()
    await pipe.closed()


async def _work(begin: Begin, pipe: Pipe[ToChild]) -> None:
    try:
        app = load_app(begin.app)
    except AppNotLoaded as error:
        pipe.write([NotLoaded(str(error))])
        return
    if begin.url is not None:
        app.connect_to(begin.url)
    crew = Crew(Runner(app, concurrency=begin.concurrency), concurrency=begin.concurrency)
    crew.report_to(pipe.write)
    pipe.write([Ready(Manifest.of(app))])
    while batch := await pipe.read():
        crew.submit([message.job for message in batch if isinstance(message, Run)])
    await crew.stop()
    await app.close()


def _die_with_worker(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)


def _ignore(*_: object) -> None:
    """A stop is the worker's to decide. A handler, not SIG_IGN, which the task's own subprocesses would inherit."""


def main() -> None:
    connection, lifeline = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    threading.Thread(target=_die_with_worker, args=(lifeline,), daemon=True).start()
    asyncio.run(serve(connection))


if __name__ == "__main__":
    main()
