"""What a task forks behaves as it would without Leveret, and cannot act as the child process that it is a copy of."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Forks:
    """From now on a fork of this process has not got these descriptors, has ``handlers`` where it would have ``ours``,
    and ends where it comes back to the event loop.
    """

    def __init__(
        self, descriptors: Sequence[int], handlers: Mapping[signal.Signals, Any], ours: Callable[..., Any]
    ) -> None:
        self._descriptors = descriptors
        self._handlers = handlers
        self._ours = ours
        #: The loop that the tasks run on.
        self.loop: asyncio.AbstractEventLoop | None = None
        #: What was blocked before; a fork holds the interpreter's lock, so there is one at a time.
        self._mask: set[signal.Signals | int] = set()
        os.register_at_fork(before=self._block, after_in_parent=self._unblock, after_in_child=self._in_the_fork)

    def _block(self) -> None:
        """A signal that ends a process would be lost while the fork still has our handler."""
        ends = [number for number, handler in self._handlers.items() if handler in (signal.SIG_DFL, None)]
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def _unblock(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _in_the_fork(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is self._ours:
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # As Python does itself since 3.12: else a signal to the fork would wake the child.
        signal.set_wakeup_fd(-1)
        self._let_go()
        self._leave_the_loop()
        self._unblock()

    def _let_go(self) -> None:
        """Not closed: their numbers would be given to others, which whoever knows the old ones might close."""
        with suppress(OSError):  # the task has closed them, or there is no descriptor left
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            for descriptor in self._descriptors:
                os.dup2(null, descriptor, inheritable=False)
            os.close(null)

    def _leave_the_loop(self) -> None:
        ready = getattr(self.loop, "_ready", None)
        if self.loop is not None and ready is not None:
            # Before what else is ready, which is the child's to run. uvloop has no such queue, and is no use in a fork.
            ready.appendleft(asyncio.Handle(_came_back, (), self.loop))


def _came_back() -> NoReturn:
    sys.stderr.write(
        "a process that a task forked awaits something on the event loop of the process that it is a copy of, and is "
        "ended: have it end with os._exit(), or use multiprocessing or asyncio.create_subprocess_exec\n"
    )
    sys.stderr.flush()
    os._exit(1)
