"""Wake-ups between processes: named pipes beside the database file.

A consumer holds its pipe open. Whoever has a task for it writes a byte, and its event loop wakes: no polling. That
the kernel closes a dead process's pipes is also how the others know that it died: opening a pipe that nobody reads
fails with ENXIO. So a consumer is alive exactly as long as its process, with no timeout to tune.

Other processes' pipes are named by the database, which others may write to. So a name is checked, no link is followed,
and nothing is opened or deleted that is not a named pipe.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import secrets
import stat
import time
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeGuard

from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.sharing import follow
from leveret.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator
    from pathlib import Path

log = logging.getLogger("leveret.sqlite")

#: A pipe that is not registered after so long never will be (seconds).
_OLD = 60.0
_NAME = re.compile(r"[0-9a-f]{16}")
#: What opening a pipe fails with that nobody holds, is not there, or is a link.
_NOBODY = frozenset({errno.ENXIO, errno.ENOENT, errno.ENOTDIR, errno.ELOOP})


class WakeUps:
    """The folder of a database's wake-ups. It and they may be used by whoever may use the database."""

    def __init__(self, database: Path) -> None:
        self.beside(database)
        #: WakeUps that this user may not open, and that were told of.
        self._closed_to_us: set[str] = set()

    def beside(self, database: Path) -> None:
        """From now on they are beside this file: what the database's name leads to may change."""
        self._database = database
        self._folder = database.with_name(f"{database.name}-consumers")

    def make(self, name: str | None = None) -> WakeUp:
        """A wake-up, new if it has no name yet, held open until it is removed or this process ends."""
        name = name or secrets.token_hex(8)
        with suppress(FileExistsError):
            self._folder.mkdir(mode=0o700)
        database = self._state()
        with self._opened() as folder:
            self._check(folder, database)
            follow(folder, database)
            os.mkfifo(name, 0o600, dir_fd=folder)
            try:
                reader = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
            except OSError:
                os.unlink(name, dir_fd=folder)
                raise
            follow(reader, database)
            # Our own writer keeps the pipe from reporting its end each time another process has written and gone.
            writer = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
        return WakeUp(self._folder / name, reader, writer)

    def follow_database(self, wake_up: WakeUp) -> None:
        """Its mode and group may have been changed since the folder and the pipe were made."""
        database = self._state()
        with self._opened() as folder:
            follow(folder, database)
        follow(wake_up.reader, database)

    def wake(self, name: object) -> None:
        """Wake a consumer. One that is dead is somebody's next sweep."""
        with suppress(OSError):
            pipe = self._open(name)
            if pipe is not None:
                try:
                    os.write(pipe, b"!")
                finally:
                    os.close(pipe)

    def is_held(self, name: object) -> bool:
        """Whether the process that made it lives. One that this user may not open does, for all that is known."""
        try:
            pipe = self._open(name)
        except PermissionError as error:
            self._tell_closed(str(name), error)
            return True
        except OSError as error:
            if error.errno in _NOBODY:
                return False
            raise
        if pipe is None:
            return False
        os.close(pipe)
        return True

    def clear(self, registered: Container[str]) -> None:
        """Remove those that nobody registered: their processes died before they could. It looks at each file."""
        before = time.time() - _OLD
        with suppress(OSError), self._opened() as folder:  # the next one that begins tries again
            for name in os.listdir(folder):  # noqa: PTH208 - by its descriptor
                state = os.stat(name, dir_fd=folder, follow_symlinks=False)
                # A young one may be about to be held, and registered.
                is_old = stat.S_ISFIFO(state.st_mode) and state.st_mtime < before and name not in registered
                if is_old and not _is_read(name, folder):
                    os.unlink(name, dir_fd=folder)

    def remove(self, name: object) -> None:
        if not _is_name(name):
            return
        with suppress(FileNotFoundError, NotADirectoryError), self._opened() as folder:
            if _is_pipe(name, folder):
                os.unlink(name, dir_fd=folder)

    def _open(self, name: object) -> int | None:
        """To write to; None: what the database names is no wake-up."""
        if not _is_name(name):
            return None
        with self._opened() as folder:
            # Before it is opened: opening alone does something to a device.
            if not _is_pipe(name, folder):
                return None
            pipe = os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder)
        if stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return pipe
        os.close(pipe)
        return None

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR) and self._folder.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, "is a symbolic link", str(self._folder)) from error
            raise
        try:
            yield folder
        except OSError as error:
            if error.filename is not None and not isinstance(error.filename, int):
                error.filename = str(self._folder / os.fsdecode(error.filename))
            raise
        finally:
            os.close(folder)

    def _state(self) -> os.stat_result | None:
        try:
            return self._database.stat()
        except FileNotFoundError:  # it is about to be made
            return None

    def _check(self, folder: int, database: os.stat_result | None) -> None:
        """In a folder that others may write to, anybody could have made it beforehand: and would own the pipes."""
        state = os.fstat(folder)
        owners = {0, os.geteuid()}
        if database is not None:
            shared = database.st_mode & 0o002 or (database.st_mode & 0o020 and state.st_gid == database.st_gid)
            if shared or state.st_uid == database.st_uid:
                return
        if state.st_uid not in owners:
            raise StoreError(
                f"{self._folder} belongs to the user with the id {state.st_uid}, who may not write {self._database}: "
                "delete that folder, and keep the file where only those who share it may write"
            )

    def _tell_closed(self, name: str, error: OSError) -> None:
        if name not in self._closed_to_us:
            self._closed_to_us.add(name)
            log.warning(
                "a consumer of %s cannot be seen by this user, and is taken for living: %s (%s); "
                "give the folder %s and what is in it the group and mode of the file",
                *(self._database, error.filename, error.strerror, self._folder),
            )


class WakeUp:
    """A wake-up that this process holds: a named pipe that is open."""

    def __init__(self, path: Path, reader: int, writer: int) -> None:
        self.name = path.name
        self._path = path
        self.reader = reader
        self._let_go = weakref.finalize(self, _close, reader, writer)
        _held.add(self)

    def drain(self) -> None:
        """Read what was written so far."""
        with suppress(BlockingIOError):
            os.read(self.reader, 65_536)

    @property
    def is_there(self) -> bool:
        """Whether it, and no other file, is where others look for it."""
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self.reader))

    def remove(self) -> None:
        if self.is_there:
            with suppress(FileNotFoundError):
                self._path.unlink()
        self.let_go()

    def let_go(self) -> None:
        """Close it, and leave the file to others."""
        self._let_go()


class Listener:
    """A wake-up that is heard on the running loop: ``woken`` is called there."""

    def __init__(self, wake_ups: WakeUps, woken: Callable[[], object]) -> None:
        self._wake_ups = wake_ups
        self._woken = woken
        self._loop = asyncio.get_running_loop()
        self._wake_up = wake_ups.make()
        self._loop.add_reader(self._wake_up.reader, self._hear)

    @property
    def name(self) -> str:
        return self._wake_up.name

    def see_to(self) -> None:
        """Hang it again if somebody deleted it: whoever looks for it next takes this process for dead."""
        if not self._wake_up.is_there:
            wake_up = self._wake_ups.make(self.name)
            self._stop_listening()
            self._wake_up.let_go()
            self._wake_up = wake_up
            self._loop.add_reader(wake_up.reader, self._hear)
        self._wake_ups.follow_database(self._wake_up)

    def remove(self) -> None:
        self._stop_listening()
        self._wake_up.remove()

    def let_go(self) -> None:
        """As the process's death would."""
        self._stop_listening()
        self._wake_up.let_go()

    def _stop_listening(self) -> None:
        self._loop.remove_reader(self._wake_up.reader)

    def _hear(self) -> None:
        self._wake_up.drain()
        self._woken()


def listening(wake_ups: WakeUps, woken: Callable[[], object], path: Path) -> Listener:
    """A wake-up of one's own. Raises StoreError if this user cannot have one beside the file."""
    try:
        return Listener(wake_ups, woken)
    except OSError as error:
        raise translate(error, path) from error


def _is_name(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _is_pipe(name: str, folder: int) -> bool:
    """Raises FileNotFoundError."""
    return stat.S_ISFIFO(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _is_read(pipe: str, folder: int) -> bool:
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=folder))
    except OSError as error:
        if error.errno in _NOBODY:
            return False
        raise
    return True


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


#: Of this process.
_held: weakref.WeakSet[WakeUp] = weakref.WeakSet()


def _close_in_forked_child() -> None:
    """A forked child that kept the pipes would make its dead parent look alive."""
    for wake_up in list(_held):
        wake_up.let_go()


# Once: what is registered here can't be taken back.
os.register_at_fork(after_in_child=_close_in_forked_child)
