"""What every no-op task does: it notes in shared memory that it ran, when, and where. A few hundred nanoseconds."""

from __future__ import annotations

import mmap
import os
import time
from functools import cache
from pathlib import Path

#: Bytes of one task: when it was sent, when it started (nanoseconds on the monotonic clock, which all processes
#: share), in which process, and how often.
_SENT, _STARTED, _PID, _RUNS, _FIELDS = 0, 1, 2, 3, 4
_WORD = 8
VARIABLE = "LEVERET_BENCH_LEDGER"


class Ledger:
    """A file of eight-byte words, mapped by all processes of a measurement."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls, path: Path, tasks: int) -> Ledger:
        path.write_bytes(bytes(tasks * _FIELDS * _WORD))
        return cls(path)

    def note_sent(self, task: int) -> None:
        self._words[task * _FIELDS + _SENT] = time.monotonic_ns()

    def note_run(self, task: int) -> None:
        words, at = self._words, task * _FIELDS
        words[at + _STARTED] = time.monotonic_ns()
        words[at + _PID] = os.getpid()
        words[at + _RUNS] += 1

    def first_missing(self, first: int, end: int) -> int:
        """The first of some tasks that has not run; ``end`` when there is none."""
        return next((task for task in range(first, end) if not self._words[task * _FIELDS + _RUNS]), end)

    @property
    def sent(self) -> list[int]:
        return self._words[_SENT::_FIELDS].tolist()

    @property
    def started(self) -> list[int]:
        return self._words[_STARTED::_FIELDS].tolist()

    @property
    def pids(self) -> list[int]:
        return self._words[_PID::_FIELDS].tolist()

    @property
    def runs(self) -> list[int]:
        return self._words[_RUNS::_FIELDS].tolist()


@cache
def own_ledger() -> Ledger:
    """The ledger that the harness made for this measurement."""
    return Ledger(Path(os.environ[VARIABLE]))


def note_run(task: int) -> None:
    own_ledger().note_run(task)
