"""What a worker tells of itself when somebody asks. Values, no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeAlias

import msgspec

from leveret.model.bounds import Count, Name, Text, UnixTime, decoded
from leveret.model.names import is_name

#: What one worker may tell of at once.
_MOST = 10_000


class RunningTask(msgspec.Struct, frozen=True):
    """A task that runs now."""

    id: Name
    #: None: the message named none, and its queue has no default task.
    task: Name | None
    queue: Name
    attempt: Count
    #: Unix time.
    since: UnixTime


class ChildReport(msgspec.Struct, frozen=True):
    """A process that runs a worker's tasks: its child, or itself."""

    pid: Count
    #: The longest first.
    running: Annotated[list[RunningTask], msgspec.Meta(max_length=_MOST)]
    #: How many it has run.
    finished: Count
    #: Its memory (bytes); 0: not known here. Linux alone tells.
    rss: Count


class WorkerReport(msgspec.Struct, frozen=True):
    """A worker's own word, of the moment in which it answered."""

    #: Its host and process id.
    name: Text
    #: Unix time.
    started_at: UnixTime
    queues: Annotated[list[Name], msgspec.Meta(max_length=_MOST)]
    children: Annotated[list[ChildReport], msgspec.Meta(max_length=_MOST)]
    #: What it was handed and has not begun.
    waiting: Count
    #: Runs that have ended, and those of them that failed, to be tried again or not.
    finished: Count
    failed: Count

    @property
    def is_plausible(self) -> bool:
        """Whether a broker could be asked for what it names."""
        return all(map(is_name, self.queues))


_decode = msgspec.json.Decoder(WorkerReport).decode


def report_of(encoded: bytes) -> WorkerReport | None:
    """None for what is none, or out of bounds. Anybody may have written it."""
    report = decoded(_decode, encoded)
    return report if report is not None and report.is_plausible else None


Describe: TypeAlias = Callable[[], WorkerReport]
