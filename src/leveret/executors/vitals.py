"""Whether a process still can what it could at its beginning: a task may change what belongs to all of them."""

from __future__ import annotations

import errno
import os
import resource
import sys
from contextlib import suppress

#: Fewer descriptors than this left are too few for what a task opens.
_SPARE = 8
_STREAMS = ("input", "output", "error")
#: Those that keep others from working. A task may lower its core files, or raise what it likes.
_LIMITS = {
    name: number
    for name in ("NOFILE", "AS", "DATA", "STACK", "RSS", "NPROC", "FSIZE", "CPU", "MEMLOCK")
    if (number := getattr(resource, f"RLIMIT_{name}", None)) is not None
}
_MEMORY = ("AS", "DATA")


class Vitals:
    """What the process is like when this is made; it is asked from several threads."""

    def __init__(self) -> None:
        self._limits = _limits()
        self._user = _user()
        self._root = _root()
        self._known = frozenset(_broken())
        self._found: str | None = None

    def fault(self) -> str | None:
        """What is wrong with it and was not at the beginning. It does not get well again."""
        if self._found is None:
            self._found = self._look()
        return self._found

    def lacks_memory(self) -> bool:
        """Whether its limits of memory are lower than at the beginning: a quick look, which fits every report."""
        return any(
            _is_lower(resource.getrlimit(_LIMITS[name])[0], self._limits[name]) for name in _MEMORY if name in _LIMITS
        )

    def _look(self) -> str | None:
        for (name, before), now in zip(self._limits.items(), _limits().values(), strict=True):
            if _is_lower(now, before):
                return f"a task has lowered RLIMIT_{name} from {_words(before)} to {_words(now)}"
        if _user() != self._user:
            return "a task has changed the process's user or groups"
        if _root() != self._root:
            return "a task has changed the process's root directory"
        return next((fault for fault in _broken() if fault not in self._known), None)


def _limits() -> dict[str, int]:
    return {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}


def _is_lower(now: int, before: int) -> bool:
    return now != resource.RLIM_INFINITY and (before == resource.RLIM_INFINITY or now < before)


def _words(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def _user() -> tuple[object, ...]:
    ids = (os.getuid(), os.geteuid(), os.getgid(), os.getegid())
    return (*ids, os.getgroups()) if sys.platform == "linux" else ids


def _root() -> tuple[int, int] | None:
    with suppress(OSError):
        root = os.stat("/")  # noqa: PTH116 - no object for each look
        return root.st_dev, root.st_ino
    return None


def _broken() -> list[str]:
    """What does not work. Each look is a few system calls."""
    faults = [f"a task has closed the standard {name}" for number, name in enumerate(_STREAMS) if not _is_open(number)]
    try:
        free = os.dup(0)
        os.close(free)
        if free >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE:
            faults.append("tasks have left nearly no descriptor to open anything with")
    except OSError as error:
        if error.errno == errno.EMFILE:
            faults.append("tasks have left no descriptor to open anything with")
    try:
        os.getcwd()  # noqa: PTH109 - no object for each look
    except OSError:
        faults.append("the working directory is gone")
    return faults


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
