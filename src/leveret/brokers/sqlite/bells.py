"""Doorbells between processes: named pipes beside the database file.

A consumer holds its bell open. Whoever has a task for it writes a byte, and its event loop wakes: no polling. That
the kernel closes a dead process's pipes is also how the others know that it died: opening a bell that nobody reads
fails with ENXIO. So a consumer is alive exactly as long as its process, with no timeout to tune.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import time
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container
    from pathlib import Path

#: A bell that is not registered after so long never will be (seconds).
_OLD = 60.0


class Bells:
    """The folder of a database's bells."""

    def __init__(self, database: Path) -> None:
        self._folder = database.with_name(f"{database.name}-consumers")

    def hang(self, name: str | None = None) -> Bell:
        """A bell, new if it has no name yet, held open until it is taken down or this process ends."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / (name or secrets.token_hex(8))
        os.mkfifo(path, 0o600)
        return Bell(path)

    def ring(self, name: str) -> None:
        """Wake a consumer. One that is dead is somebody's next sweep."""
        with suppress(OSError):
            bell = os.open(self._folder / name, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(bell, b"!")
            finally:
                os.close(bell)

    def is_held(self, name: str) -> bool:
        """Whether the bell's process lives."""
        try:
            os.close(os.open(self._folder / name, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    def clear(self, registered: Container[str]) -> None:
        """Remove bells that nobody registered: their processes died before they could. It looks at each file."""
        before = time.time() - _OLD
        with suppress(OSError):  # the next one that begins tries again
            for path in self._folder.iterdir():
                # A young one may be about to be held, and registered.
                if path.name not in registered and path.stat().st_mtime < before and not self.is_held(path.name):
                    self.take_down(path.name)

    def take_down(self, name: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            (self._folder / name).unlink()


class Bell:
    """A bell that this process holds."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # Our own writer keeps the pipe from reporting its end each time another process has rung and gone.
        self._writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        self._let_go = weakref.finalize(self, _close, self.reader, self._writer)
        _held.add(self)

    def hush(self) -> None:
        """Forget the rings so far."""
        with suppress(BlockingIOError):
            os.read(self.reader, 65_536)

    @property
    def hangs(self) -> bool:
        return self._path.exists()

    def take_down(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()
        self.let_go()

    def let_go(self) -> None:
        """Close it, and leave the file to others."""
        self._let_go()


class Listener:
    """A bell that is heard on the running loop: ``rung`` is called there."""

    def __init__(self, bells: Bells, rung: Callable[[], object]) -> None:
        self._bells = bells
        self._rung = rung
        self._loop = asyncio.get_running_loop()
        self._bell = bells.hang()
        self._loop.add_reader(self._bell.reader, self._hear)

    @property
    def name(self) -> str:
        return self._bell.name

    def see_to(self) -> None:
        """Hang it again if somebody deleted it: whoever looks for it next takes this process for dead."""
        if not self._bell.hangs:
            bell = self._bells.hang(self.name)
            self._stop_listening()
            self._bell.let_go()
            self._bell = bell
            self._loop.add_reader(bell.reader, self._hear)

    def take_down(self) -> None:
        self._stop_listening()
        self._bell.take_down()

    def let_go(self) -> None:
        """As the process's death would."""
        self._stop_listening()
        self._bell.let_go()

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._bell.reader)

    def _hear(self) -> None:
        self._bell.hush()
        self._rung()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


#: Of this process.
_held: weakref.WeakSet[Bell] = weakref.WeakSet()


def _close_in_forked_child() -> None:
    """A forked child that kept the bells would make its dead parent look alive."""
    for bell in list(_held):
        bell.let_go()


# Once: what is registered here can't be taken back.
os.register_at_fork(after_in_child=_close_in_forked_child)
