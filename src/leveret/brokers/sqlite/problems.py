"""What SQLite and the file system refuse, as Leveret's errors, with the remedy; and as lines of the log."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from typing import TYPE_CHECKING

from leveret.brokers.sqlite.sharing import forbidden, this_user
from leveret.errors import BrokerError, BrokerUnavailable, StoreError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("leveret.sqlite")

#: A disk with so much left is not full: what is written at once is less (bytes).
_ROOM = 64 * 1024 * 1024


class Trouble:
    """What goes wrong for a while: said when it begins, and when it has ended, however often it is tried meanwhile.

    ``what``: what cannot be done, as the log says it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._said = ""

    @property
    def lasts(self) -> bool:
        return bool(self._said)

    def begin(self, error: Exception) -> None:
        """It failed. Said once for each reason."""
        text = str(error)
        if text != self._said:
            log.warning("%s, trying again until it works: %s", self._what, text)
            self._said = text or type(error).__name__

    def end(self) -> None:
        """It works."""
        if self._said:
            log.warning("it works again, after: %s", self._what)
            self._said = ""


def is_locked(error: BaseException) -> bool:
    """Whether another process held the file for all of the time that it was waited for."""
    text = str(error)
    return isinstance(error, sqlite3.OperationalError) and ("locked" in text or "busy" in text)


def is_damage(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a database" in text)


def translate(error: BaseException, path: Path) -> BrokerError:
    """sqlite3's and the file system's exceptions as Leveret's, with the remedy."""
    if isinstance(error, BrokerError):
        return error
    translated = BrokerUnavailable(_LOCKED_TEXT.format(path)) if is_locked(error) else StoreError(_text(error, path))
    translated.__cause__ = error
    return translated


_LOCKED_TEXT = "{} is being written by another process and stayed locked; try again"


def _text(error: BaseException, path: Path) -> str:
    if isinstance(error, OSError):
        return _os_text(error, path)
    text, name = str(error), getattr(error, "sqlite_errorname", "")
    if "unable to open" in text:
        missing = f"{path} cannot be opened: does its folder exist, and may this user write there?"
        return forbidden(path) or missing
    if "readonly" in text:
        return forbidden(path) or f"{path} is read-only for this user; make the file and its folder writable"
    if name == "SQLITE_FULL" and _has_room(path):
        return (
            f"{path} takes nothing more, though its disk is not full ({text}): a quota, PRAGMA max_page_count, or a "
            "last row number that another program wrote; nothing was stored"
        )
    if "full" in text or (name.startswith("SQLITE_IOERR") and _is_full(path)):
        return f"the disk of {path} is full; nothing was stored"
    if is_damage(error):
        return (
            f"{path} is damaged or not an SQLite file ({text}); it was left as it is. An encrypted file cannot be "
            "read. If a backup was copied over it, end all programs, delete its -wal and -shm files, and copy it again"
        )
    if name.startswith("SQLITE_IOERR_SHM") or "locking protocol" in text:
        return (
            f"the file system of {path} cannot share memory or locks between programs ({text}): put it on a local disk"
        )
    return f"{path}: {type(error).__name__}: {text}"


def _os_text(error: OSError, path: Path) -> str:
    """Who may not do what to which file."""
    file = error.filename if isinstance(error.filename, str) else os.fspath(error.filename or path)
    if isinstance(error, PermissionError):
        reason = forbidden(path) if file == os.fspath(path) else None
        return reason or (
            f"{this_user()} may not use {file}, and so not {path} ({error.strerror}): share the file, and what lies "
            "beside it, with a group, as the page on security says"
        )
    if isinstance(error, FileNotFoundError):
        return forbidden(path) or f"{path} cannot be opened: does its folder exist, and may this user write there?"
    if error.errno == errno.ENOSPC:
        return f"the disk of {path} is full; nothing was stored"
    if error.errno == errno.EROFS:
        return (
            f"{file} is on a file system that is mounted read-only: Leveret writes even to look, so mount it writable"
        )
    if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
        return f"the file system of {path} cannot have named pipes, which wake workers: put the file on a local disk"
    return f"{path} cannot be used: {error.strerror or error}" + (f" ({file})" if file != os.fspath(path) else "")


def _has_room(path: Path) -> bool:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize > _ROOM


def _is_full(path: Path) -> bool:
    try:
        return os.statvfs(path.parent).f_bavail == 0
    except OSError:
        return False
