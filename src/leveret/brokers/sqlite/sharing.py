"""Who may use the file: what lies beside it follows its mode and group, and whoever may not is told what and why."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def follow(descriptor: int, database: os.stat_result | None) -> None:
    """Give an open folder or named pipe of Leveret's to those who have the database; None: to its owner alone.

    What this user may not change stays as it is. A group that cannot be the database's gets no right.
    """
    state = os.fstat(descriptor)
    if database is not None:
        owner = database.st_uid if os.geteuid() == 0 else state.st_uid
        if (state.st_uid, state.st_gid) != (owner, database.st_gid):
            with suppress(PermissionError):
                os.fchown(descriptor, owner, database.st_gid)
                state = os.fstat(descriptor)
    mode = _mode(state, database)
    if stat.S_IMODE(state.st_mode) != mode:
        with suppress(PermissionError):
            os.fchmod(descriptor, mode)


def _mode(state: os.stat_result, database: os.stat_result | None) -> int:
    mode = 0o600 if database is None else database.st_mode & 0o666
    if database is not None and state.st_gid != database.st_gid:
        mode &= ~0o060
    if stat.S_ISDIR(state.st_mode):
        # Whoever may read may enter; a set-group-id folder stays one.
        mode |= (mode & 0o444) >> 2 | state.st_mode & (stat.S_ISGID | stat.S_ISVTX)
    return mode


def share_logs(path: Path) -> None:
    """SQLite gives its own files the database's mode. Their group is the folder's, or that of whoever made them."""
    group = path.stat().st_gid
    for log in (path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        with suppress(FileNotFoundError, PermissionError):
            if log.lstat().st_gid != group:
                os.chown(log, -1, group, follow_symlinks=False)


def forbidden(path: Path) -> str | None:
    """What this user may not do that using the database takes, with the remedy; None: nothing is found."""
    try:
        return _forbidden(path)
    except OSError:
        return None


def _forbidden(path: Path) -> str | None:
    for folder in reversed(path.parents):
        if not folder.is_dir():
            return None
        if not _may(folder, os.X_OK):
            return _may_not("enter", folder)
    for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        if file.exists() and not _may(file, os.R_OK | os.W_OK):
            return _may_not("write" if _may(file, os.R_OK) else "read and write", file)
    if not _may(path.parent, os.W_OK):
        return _may_not("make files in", path.parent)
    if path.exists() and path.parent.stat().st_mode & stat.S_ISVTX and path.stat().st_uid != os.geteuid():
        return (
            f"{this_user()} may not use {path}, another user's file in a folder that has the sticky bit: "
            "move it to a folder of those who share it"
        )
    return None


def _may(file: Path, do: int) -> bool:
    return os.access(file, do, effective_ids=os.access in os.supports_effective_ids)


def _may_not(do: str, file: Path) -> str:
    if os.statvfs(file).f_flag & os.ST_RDONLY:
        return (
            f"{file} is on a file system that is mounted read-only: Leveret writes even to look, so mount it writable"
        )
    state = file.stat()
    return (
        f"{this_user()} may not {do} {file} (mode {stat.S_IMODE(state.st_mode):04o}, user {state.st_uid}, "
        f"group {state.st_gid}), and even looking takes that: share the file with a group, as the page on security says"
    )


def this_user() -> str:
    number = os.geteuid()
    try:
        return f"user {pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return f"the user with the id {number}"
