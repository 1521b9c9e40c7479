"""Doorbells between processes: named pipes beside the database file.

A consumer holds its bell open. Whoever has a task for it writes a byte, and its event loop wakes: no polling. That
the kernel closes a dead process's pipes is also how the others know that it died: opening a bell that nobody reads
fails with ENXIO. So a consumer is alive exactly as long as its process, with no timeout to tune.
"""

from __future__ import annotations

import errno
import os
import secrets
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Bells:
    """The folder of a database's bells."""

    def __init__(self, database: Path) -> None:
        self._folder = database.with_name(f"{database.name}-consumers")

    def hang(self) -> Bell:
        """A new bell, held open until it is taken down or this process ends."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        path = self._folder / secrets.token_hex(8)
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

    def silent(self) -> list[str]:
        """The bells whose processes died."""
        try:
            names = [path.name for path in self._folder.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [name for name in names if not self.is_held(name)]

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
        _close_in_forked_child(self)

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
        self._let_go()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _close_in_forked_child(bell: Bell) -> None:
    """A forked child that kept the bell would make its dead parent look alive."""
    reference = weakref.ref(bell)

    def close() -> None:
        bell = reference()
        if bell is not None:
            bell._let_go()  # noqa: SLF001 - one class in two parts

    os.register_at_fork(after_in_child=close)
