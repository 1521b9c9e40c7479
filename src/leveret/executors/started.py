"""A process that was started, on any event loop (uvloop's own subprocesses differ), and the end of its session."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.executors import session

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("leveret.executors")


class StartedProcess:
    """A process with no standard input that leads a session of its own. It is awaited on the loop that started it.

    When it has ended, so does what it has started; only then is its end told.
    """

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # A session of its own: Ctrl-C in a terminal is for the worker, which decides what to do about its children;
        # and what the tasks start can be told by it.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=pass_fds, start_new_session=True)
        threading.Thread(target=self._await_end, name=f"leveret-wait-{self.pid}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    def send_signal(self, number: int) -> None:
        """Does nothing when it has ended."""
        # Its number is its own until it is reaped, and only the loop's thread does that.
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> None:
        """Until it has ended, with what it has started."""
        await asyncio.shield(self._ended)

    def _await_end(self) -> None:
        """In a thread of its own: wait, end its session, and leave the reaping to the loop."""
        with suppress(ChildProcessError):  # somebody else reaped it
            if hasattr(os, "waitid"):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            else:  # macOS before Python 3.13
                self._process.wait()
            left = session.end(self.pid)
            if left:
                log.error("processes that a child process (pid %d) left behind can't be ended: %s", self.pid, left)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        self._process.wait()
        if not self._ended.done():
            self._ended.set_result(None)
