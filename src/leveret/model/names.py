"""Names and ids: what they may be, and new ones."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from typing import TYPE_CHECKING

from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

DEAD_SUFFIX = ".dead"
PAUSED_SUFFIX = ".paused"
GATE_SUFFIX = ".gate"
DELAY_INFIX = ".delay."
MAX_TASK_NAME = 255
MAX_ID = 255
MAX_QUEUE_NAME = 255 - len(DELAY_INFIX) - len("16777216000")


def fits(name: str, limit: int) -> bool:
    """Whether a name is text of 1 to so many bytes."""
    try:
        return 0 < (len(name) if str.isascii(name) else len(str.encode(name))) <= limit
    except (UnicodeEncodeError, TypeError):
        return False


def is_name(text: str) -> bool:
    """Whether a broker can be asked for a queue or a task of that name."""
    return fits(text, 255)


def check_task_name(name: str) -> None:
    """Raises ConfigurationError for a name that does not fit AMQP's ``type`` property (a short string)."""
    if not fits(name, MAX_TASK_NAME):
        raise ConfigurationError(
            f"task name {name!r} must be text of 1 to {MAX_TASK_NAME} bytes (AMQP's property 'type')"
        )


def check_id(id_: object) -> None:
    """Raises ConfigurationError for an id that cannot be shown, or does not fit AMQP's property ``message_id``."""
    if not isinstance(id_, str) or not id_.isprintable() or not fits(id_, MAX_ID):
        raise ConfigurationError(
            f"task id {id_!r} must be printable text of 1 to {MAX_ID} bytes (AMQP's property 'message_id')"
        )


def repeated(ids: Sequence[str]) -> list[str]:
    """The ids that are there more than once."""
    return [id_ for id_, count in Counter(ids).items() if count > 1]


def this_process() -> str:
    """What a worker is called where others read of it: its host and process id."""
    return f"{platform.node() or 'localhost'}:{os.getpid()}"


def new_id() -> str:
    """A task id: 32 hex digits, the first 12 of them the time in milliseconds, so that ids sort by age (as UUIDv7)."""
    return new_ids(1)[0]


def new_ids(count: int) -> list[str]:
    """That many, ascending: in an index those of tasks that are stored, and run, together stand together.

    The system is asked for chance once.
    """
    now = f"{time.time_ns() // 1_000_000:012x}"
    chance = os.urandom(10 * count).hex()
    return sorted([now + chance[start : start + 20] for start in range(0, 20 * count, 20)])
