"""What a worker tells of itself when somebody asks. Values, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec


class RunningTask(msgspec.Struct, frozen=True):
    """A task that runs now."""

    id: str
    #: None: the message named none, and its queue has no default task.
    task: str | None
    queue: str
    attempt: int
    #: Unix time.
    since: float


class ChildReport(msgspec.Struct, frozen=True):
    """A process that runs a worker's tasks: its child, or itself."""

    pid: int
    #: The longest first.
    running: list[RunningTask]
    #: How many it has run.
    finished: int
    #: Its memory (bytes); 0: not known here. Linux alone tells.
    rss: int


class WorkerReport(msgspec.Struct, frozen=True):
    """A worker's own word, of the moment in which it answered."""

    #: Its host and process id.
    name: str
    #: Unix time.
    started_at: float
    queues: list[str]
    children: list[ChildReport]
    #: What it was handed and has not begun.
    waiting: int
    #: Runs that have ended, and those of them that failed, to be tried again or not.
    finished: int
    failed: int


Describe: TypeAlias = Callable[[], WorkerReport]
