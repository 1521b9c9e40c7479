"""What becomes of priorities: by the server's version, and by the queue that is there. Pure: no I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from leveret.model import MAX_PRIORITY

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.queues.topology import Declaration
    from leveret.model import Queue

#: Quorum queues: none before, then two levels, then strict.
_TWO_LEVELS, _STRICT = (4, 0), (4, 3)


class Given(msgspec.Struct, frozen=True):
    """What a queue makes of priorities, for the log, and whether that is all that was asked for."""

    text: str
    complete: bool


def expires_in_order(version: tuple[int, ...]) -> bool:
    """Whether messages of mixed priorities in a queue with one TTL leave it when they expire.

    From 4.0 to 4.2 only the first message of both levels together is looked at, and it may be a younger one.
    """
    return not _TWO_LEVELS <= version < _STRICT


def given(queue: Queue, found: Declaration, version: tuple[int, ...]) -> Given:
    """What the queue that was found, or made, makes of priorities on a server of that version."""
    if found.arguments.get("x-queue-type", "classic") == "classic":
        return _given_by_classic(queue, found.arguments.get("x-max-priority"))
    server = f"RabbitMQ {'.'.join(map(str, version))}"
    if version >= _STRICT:
        return Given(f"priorities are strict (a quorum queue on {server})", complete=True)
    remedy = "upgrade to 4.3, or have a classic queue under another name: Queue(..., kind='classic')"
    if version >= _TWO_LEVELS:
        text = f"{server} knows two priorities in a quorum queue, above 4 and the rest, and takes two to one"
    else:
        text = f"{server} ignores priorities in a quorum queue"
    return Given(f"{text}; {remedy}", complete=False)


def _given_by_classic(queue: Queue, most: object) -> Given:
    if not isinstance(most, int) or most < 1:
        text = "it is a classic queue without x-max-priority, which ignores priorities; it cannot be changed"
        return Given(f"{text}: delete it when it is empty, or use another name", complete=False)
    if most < MAX_PRIORITY:
        text = f"it is a classic queue with x-max-priority={most}, so a higher priority counts as {most}"
        return Given(text, complete=False)
    if queue.kind != "classic":
        text = (
            "it is a classic queue, where a task without a priority counts as 0; Queue(..., kind='classic') makes it 4"
        )
        return Given(text, complete=False)
    return Given(f"priorities are strict (a classic queue with x-max-priority={most})", complete=True)
