"""A child is started as the leader of a session, and what its tasks have started ends with it.

A child leads a session of its own, so the processes that its tasks start are in that session, whatever became of their
parents and groups. One that makes a session for itself (`setsid`, ``start_new_session=True``) has left on purpose, and
is let go. Only Linux can list a session; elsewhere it is the child's process group that ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

log = logging.getLogger("leveret.executors")

#: What a task has started may take so long to end after SIGTERM, before SIGKILL (seconds).
GRACE = 0.5
#: After SIGKILL it is gone in a moment, unless it may not be killed by us, or waits for a device (seconds).
_KILLED = 2.0
_LOOK = 0.01


class StartedProcess:
    """A process with no standard input that leads a session of its own. It is awaited on the loop that started it,
    whichever that is (uvloop's own subprocesses differ).

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
            left = end(self.pid)
            if left:
                log.error("processes that a child process (pid %d) left behind can't be ended: %s", self.pid, left)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        self._process.wait()
        if not self._ended.done():
            self._ended.set_result(None)


def members(leader: int) -> dict[int, int]:
    """The processes that run in that session, without its leader, and the group of each; none but on Linux."""
    if sys.platform != "linux":
        return {}
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - a hundred thousand Path objects otherwise
        if name.isdigit() and int(name) != leader:
            with suppress(OSError, ValueError, IndexError):
                state, _, group, session, *_ = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if int(session) == leader and state not in "ZX":
                    found[int(name)] = int(group)
    return found


def end(leader: int) -> list[int]:
    """End what is left of the session of a leader that has ended and is not reaped yet; what could not be ended.

    It blocks for a moment, if anything is left. While the leader is not reaped, its number cannot be another's.
    """
    left = members(leader)
    if left:
        _send([leader, *left.values()], signal.SIGTERM)
        # What is stopped would not see it.
        _send([leader, *left.values()], signal.SIGCONT)
        left = _wait(leader, GRACE)
    deadline = time.monotonic() + _KILLED
    # A group at a time: one signal reaches all of it, also those that it forks meanwhile.
    _send([leader], signal.SIGKILL)
    while left and time.monotonic() < deadline:
        _send(left.values(), signal.SIGKILL)
        left = _wait(leader, _LOOK)
    return sorted(left)


def end_own() -> None:
    """End this process with all that is in its session, at once, if it leads one; else return."""
    own = os.getpid()
    if os.getsid(0) != own:
        return
    for _ in range(3):
        groups = set(members(own).values()) - {own}
        if not groups:
            break
        _send(groups, signal.SIGKILL)
    os.killpg(own, signal.SIGKILL)


def _wait(leader: int, seconds: float) -> dict[int, int]:
    """Until nothing is left, or for so long; what is left."""
    deadline = time.monotonic() + seconds
    while (left := members(leader)) and time.monotonic() < deadline:
        time.sleep(_LOOK)
    return left


def _send(groups: Iterable[int], number: int) -> None:
    for group in set(groups):
        # Gone by now, or another user's: what is left is seen and told.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
