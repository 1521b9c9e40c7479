"""Which file the database's path names: one that two names or mounts lead to, and one that was removed or replaced.

SQLite keeps its log beside the name by which a file was opened. Opened by two names, a file has two logs, and each
program sees its own alone. It also goes on with a file that has lost its name, which nobody else will ever open.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import weakref
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from leveret.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("leveret.sqlite")

#: away: nothing, or an empty file, has the database's name. replaced: another file has it. unlogged: the log or its
#: index was deleted. relogged: another log or index has its name.
Change: TypeAlias = Literal["away", "replaced", "unlogged", "relogged"]
_Id: TypeAlias = tuple[int, int]

_MOUNTS = "/proc/self/mountinfo"
#: File systems that other machines may use at the same time.
_SHARED = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|fuse\.(sshfs|glusterfs|s3fs|rclone|ceph\S*)|lustre|gpfs|beegfs|ocfs2|gfs2?"
)


class FileAway(StoreError):
    """Its name leads to no file now; it may be back soon."""


class IndexAway(StoreError):
    """Its log's index was deleted, and another connection of this process still has it: SQLite gives one to all."""


class Identity:
    """The files of an open database, as they were when it was opened. ``path``: as the user wrote it."""

    def __init__(self, path: Path, database: Path) -> None:
        self.database = database
        self._path = os.fspath(path)
        self._log = database.with_name(f"{database.name}-wal")
        self._index = database.with_name(f"{database.name}-shm")
        # Held open, to see whether it was deleted or moved. SQLite locks the others, so they must not be closed here.
        self._held = os.open(self._log, os.O_RDONLY | os.O_NOFOLLOW)
        weakref.finalize(self, os.close, self._held)
        self._main_id = _id(path.stat())
        index = _id_of(os.fspath(self._index))
        if index is None:
            raise IndexAway(f"{self._index} was deleted while this program used it; start the program again")
        self._log_ids = _id(os.fstat(self._held)), index
        self._log_names = os.fspath(self._log), os.fspath(self._index)

    def main_change(self) -> Change | None:
        """Whether the database's name leads elsewhere by now. Asked at each transaction, so it looks at one file."""
        try:
            state = os.stat(self._path)  # noqa: PTH116 - a Path takes twice as long
        except OSError:
            return "away"
        if not state.st_size:
            return "away"
        return None if _id(state) == self._main_id else "replaced"

    def change(self) -> Change | None:
        """The same, and of its log too."""
        change = self.main_change()
        if change is not None:
            return change
        found = tuple(map(_id_of, self._log_names))
        if found == self._log_ids:
            return None
        is_lost = all(there in (None, known) for there, known in zip(found, self._log_ids, strict=True))
        return "unlogged" if is_lost else "relogged"

    @property
    def may_keep_log(self) -> bool:
        """Whether what is in the log may still be written into the file: it is there, or was deleted, but not moved."""
        there = _id_of(self._log_names[0])
        return there == self._log_ids[0] or (there is None and os.fstat(self._held).st_nlink == 0)

    def put_log_aside(self) -> Path | None:
        """When another file has the database's name: SQLite would take this one's log for that one's. Its new name.

        None: there is nothing to put aside, or it is not this one's.
        """
        with suppress(OSError):
            if _id_of(self._log_names[1]) == self._log_ids[1]:
                self._index.unlink()
            if _id_of(self._log_names[0]) == self._log_ids[0]:
                if self._log.stat().st_size:
                    return self._log.rename(f"{self._log}.of-replaced-{self._main_id[1]}")
                self._log.unlink()
        return None


def check_place(path: Path, database: Path) -> None:
    """Raises StoreError for a file that programs may open by different names, or that is no file."""
    try:
        state = os.lstat(database)
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(state.st_mode):
        raise StoreError(f"{path} is not a file but {_KINDS.get(stat.S_IFMT(state.st_mode), 'something else')}")
    if state.st_nlink > 1:
        raise StoreError(
            f"{path} has {state.st_nlink} names (hard links). SQLite keeps a log for each, so programs that open it by "
            f"different names would lose each other's tasks: delete the others "
            f"(find {database.parent} -xdev -inum {state.st_ino}), and use a symbolic link or `.backup` instead"
        )
    name = os.fspath(database)
    filesystem = ""
    longest = -1
    for point, kind in _mounts():
        if point in (name, f"{name}-wal", f"{name}-shm"):
            raise StoreError(
                f"{point} is a mount of its own, so other programs see another log beside "
                f"{path}, and tasks would be lost: mount the folder that holds it, not the file alone"
            )
        if len(point) >= longest and (point == "/" or name.startswith(f"{point}/")):
            longest, filesystem = len(point), kind
    if _SHARED.fullmatch(filesystem):
        log.warning(
            "%s is on a file system of the kind %s, which other machines may use too: all programs that use the file "
            "must run on this machine, or tasks are lost",
            *(path, filesystem),
        )


def _mounts() -> Iterator[tuple[str, str]]:
    """Where file systems are mounted, and their kinds; the last one at a place is what is seen there."""
    try:
        text = Path(_MOUNTS).read_text(errors="surrogateescape")
    except OSError:  # not Linux
        return
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) > 4 and after:
            yield re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4]), after.split(" ")[0]


def _id_of(name: str) -> _Id | None:
    try:
        return _id(os.stat(name))  # noqa: PTH116 - a Path takes twice as long
    except OSError:
        return None


def _id(state: os.stat_result) -> _Id:
    return state.st_dev, state.st_ino


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link that leads in a circle",
}
