"""What is asked of whoever admits tasks, and what is answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.model import DeclareLimits, PauseLimit, RemoveLimit, RestLimit, ResumeLimit, SetLimit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Ended(msgspec.Struct, frozen=True, tag=True):
    """Permits are given back."""

    permits: list[str]


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Queues have tasks that wait."""

    queues: list[str]


class AskAlive(msgspec.Struct, frozen=True, tag=True):
    """Which of these permits are there?"""

    permits: list[str]


class AskUses(msgspec.Struct, frozen=True, tag=True):
    """What do the limits do?"""


class AskHeld(msgspec.Struct, frozen=True, tag=True):
    """How many tasks that wait are held, by queue?"""


class Clear(msgspec.Struct, frozen=True, tag=True):
    """What waits of a queue is deleted."""

    queue: str


class Emptied(msgspec.Struct, frozen=True, tag=True):
    """A queue was purged, or is empty: of its tasks there are those that workers have."""

    queue: str
    #: How many that are, and the ids of those among them that are known to run.
    taken: int
    running: list[str]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """To whoever asked."""

    refusal: str = ""
    problem: str = ""
    alive: list[str] = []
    held: dict[str, int] = {}


#: What is asked of whoever holds the table.
Asked: TypeAlias = (
    DeclareLimits
    | SetLimit
    | PauseLimit
    | ResumeLimit
    | RestLimit
    | RemoveLimit
    | Serve
    | Ended
    | AskAlive
    | AskUses
    | AskHeld
    | Clear
    | Emptied
)
#: How many messages are ready in a queue, and how many consumers it has; None: there is no such queue.
Count: TypeAlias = "Callable[[str], Awaitable[tuple[int, int] | None]]"
#: What workers have of a queue that is empty; None: that is not known, or it is not empty.
LookInto: TypeAlias = "Callable[[str], Awaitable[Emptied | None]]"
