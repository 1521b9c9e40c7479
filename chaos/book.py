"""The ledger: what was enqueued and what ran, as producers and workers noted it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Run(msgspec.Struct):
    """The runs of one task: when each began and ended (Unix time)."""

    starts: list[float] = []
    ends: list[float] = []
    #: The child that began the last one.
    pid: int = 0


class Book:
    """Two files that only grow, and what they say so far."""

    def __init__(self, folder: Path) -> None:
        self.sent, self.runs = folder / "sent", folder / "runs"
        self.sent.touch()
        self.runs.touch()
        self._offsets = {self.sent: 0, self.runs: 0}
        #: When each task that is known to be stored was.
        self.safe: dict[str, float] = {}
        self.unknown: set[str] = set()
        self.refused = 0
        #: Tasks whose result a producer waits for, and those of which it has come.
        self.awaited: set[str] = set()
        self.answered: set[str] = set()
        self.tasks: dict[str, Run] = {}
        self.lines = 0

    def read(self) -> None:
        """Take in what was written since."""
        for word, id_, moment, _ in self._lines(self.sent):
            if word == "safe":
                self.safe[id_] = moment
            elif word == "unknown":
                self.unknown.add(id_)
            elif word == "awaited":
                self.awaited.add(id_)
            elif word == "answered":
                self.answered.add(id_)
            else:
                self.refused += 1
        for word, id_, moment, pid in self._lines(self.runs):
            run = self.tasks.setdefault(id_, Run())
            if word == "start":
                run.starts.append(moment)
                run.pid = pid
            else:
                run.ends.append(moment)

    def undone(self) -> set[str]:
        """Safe tasks that no run has finished."""
        return {id_ for id_ in self.safe if id_ not in self.tasks or not self.tasks[id_].ends}

    def doubled(self) -> int:
        """Safe tasks that began more than once."""
        return sum(len(self.tasks[id_].starts) > 1 for id_ in self.safe if id_ in self.tasks)

    def running(self) -> set[int]:
        """The children that are in the middle of a task."""
        return {run.pid for run in self.tasks.values() if len(run.starts) > len(run.ends)}

    def fresh(self, since: float) -> int:
        """How many tasks that were enqueued after a moment are done."""
        return sum(moment > since for id_, moment in self.safe.items() if id_ in self.tasks and self.tasks[id_].ends)

    def first_start(self, since: float) -> float | None:
        return min((start for run in self.tasks.values() for start in run.starts if start > since), default=None)

    def last_end(self, stored_by: float) -> float | None:
        """When the last of the tasks that were stored by a moment was first done."""
        return max(
            (
                self.tasks[id_].ends[0]
                for id_, moment in self.safe.items()
                if moment <= stored_by and id_ in self.tasks and self.tasks[id_].ends
            ),
            default=None,
        )

    def longest_wait(self) -> float | None:
        """From being stored to the first end of a run."""
        waits = (
            self.tasks[id_].ends[0] - moment
            for id_, moment in self.safe.items()
            if id_ in self.tasks and self.tasks[id_].ends
        )
        return max(waits, default=None)

    def _lines(self, path: Path) -> Iterator[tuple[str, str, float, int]]:
        with path.open("rb") as file:
            file.seek(self._offsets[path])
            data = file.read()
        whole = data.rpartition(b"\n")[0]
        if not whole:
            return
        self._offsets[path] += len(whole) + 1
        for line in whole.decode().split("\n"):
            word, id_, moment, pid = line.split()
            self.lines += 1
            yield word, id_, float(moment), int(pid)
