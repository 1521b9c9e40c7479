"""What is declared on RabbitMQ, and what an existing queue is good for: its arguments, its priorities. Pure: no I/O.

A task queue is durable, of type quorum, and nothing else: what most of RabbitMQ's own tutorials declare, so that
producers and consumers in other languages share it without a PRECONDITION_FAILED. docs/wire-format.md lists them.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from leveret.errors import QueueMismatch
from leveret.model import DEAD_SUFFIX, DELAY_INFIX, GATE_SUFFIX, MAX_PRIORITY, PAUSED_SUFFIX, Queue

#: Workers and `leveret queues` talk through it.
CONTROL_EXCHANGE = "leveret.control"
_QUORUM = {"x-queue-type": "quorum"}
_KINDS: dict[str, dict[str, Any]] = {
    "quorum": _QUORUM,
    "classic": {"x-queue-type": "classic", "x-max-priority": MAX_PRIORITY},
}
#: Looking at a dead letter returns it, and RabbitMQ 4.0 to 4.2 drops a message after 20 returns by default.
_DEAD_ARGUMENTS = {**_QUORUM, "x-delivery-limit": 2**31 - 1}
#: What is held comes back with each holder that ends, and RabbitMQ 4 drops a message after 20 returns by default; 4.3
#: waits for a holder whose node is gone, 60 s by default (milliseconds).
HELD_ARGUMENTS = {**_DEAD_ARGUMENTS, "x-consumer-disconnected-timeout": 5_000}
#: Should whoever made it die before it is deleted (milliseconds).
_SCRATCH_EXPIRES = 60_000
#: Arguments that let the broker drop tasks by itself.
_LOSSY = ("x-delivery-limit", "x-message-ttl", "x-expires", "x-max-length", "x-max-length-bytes")
#: A quorum queue ignores priorities, since the first of these versions it knows two levels, since the second all.
_TWO_LEVELS, _STRICT = (4, 0), (4, 3)


class Declaration(msgspec.Struct, frozen=True):
    """A queue's properties, as `queue.declare` takes them."""

    name: str
    durable: bool = True
    auto_delete: bool = False
    arguments: dict[str, Any] = {}

    def described(self) -> dict[str, Any]:
        return {"durable": self.durable, "auto_delete": self.auto_delete, **self.arguments}


class Difference(msgspec.Struct, frozen=True):
    """The one property by which RabbitMQ refused a declaration: its name and the value the queue has."""

    name: str
    current: Any


#: How long each delay queue keeps a message (milliseconds): an eighth of a second, doubled up to 194 days.
DELAY_STEPS = tuple(125 * 2**power for power in range(28))
#: Those that a task queue gets when its first task is delayed by so long; the others are for queues that delay many.
FEW_STEPS = (125, 2_000, 512_000)
#: Whoever makes any delay queue makes the first of these too, and whoever makes one that is not of the few the second.
#: So where these are missing, there is no need to look for the others.
FIRST_STEP, FIRST_CLOSER_STEP = DELAY_STEPS[:2]

#: Settlements of a queue that may be on their way to it when their channel closes. A channel sends a quorum queue 32
#: commands ahead of what the queue has applied; it keeps the rest to itself, and takes it along when it closes
#: (rabbit_fifo_client, RabbitMQ 3.10 to 4.3): those messages are delivered again.
UNAPPLIED = 16


def delay_step(remaining: float) -> int | None:
    """The longest step that is not too long for a task due in so many seconds; None when it is due within the shortest.

    A task climbs down: a step that fits, then one that fits what remains. So it is never early, and no short delay ever
    waits behind a long one. Always on the longest, it takes one hop for each binary digit of its delay.
    """
    fitting = [milliseconds for milliseconds in DELAY_STEPS if milliseconds <= remaining * 1000]
    return fitting[-1] if fitting else None


def delay_queue(name: str, milliseconds: int) -> str:
    return f"{name}{DELAY_INFIX}{milliseconds}"


def delay_declaration(name: str, milliseconds: int) -> Declaration:
    """A queue that keeps messages for one time and returns them to their task queue, at least once.

    At-least-once dead-lettering (RabbitMQ 3.10 and later, quorum queues) wants the last two arguments.
    """
    return Declaration(
        delay_queue(name, milliseconds),
        arguments={
            **_QUORUM,
            "x-message-ttl": milliseconds,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": name,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )


def steps_made_with(milliseconds: int) -> tuple[int, ...]:
    """The steps to make for one that is wanted."""
    firsts = {FIRST_STEP} if milliseconds in FEW_STEPS else {FIRST_STEP, FIRST_CLOSER_STEP}
    return (milliseconds, *sorted(firsts - {milliseconds}))


def scratch_queue(name: str, number: int) -> Declaration:
    """A queue that is made and deleted at once, beside a task queue's delay queues; see `have_names_written`."""
    return Declaration(f"{name}{DELAY_INFIX}0{number}", arguments={**_QUORUM, "x-expires": _SCRATCH_EXPIRES})


def dead_queue(name: str) -> str:
    return f"{name}{DEAD_SUFFIX}"


def gate_queue(name: str) -> str:
    """Where the tasks of a queue wait that have limits."""
    return f"{name}{GATE_SUFFIX}"


def gate_declaration(name: str, max_length: int | None = None) -> Declaration:
    """Whoever admits tasks holds many of them, and each one that ends returns them."""
    limit = {} if max_length is None else {"x-max-length": max_length, "x-overflow": "reject-publish"}
    return Declaration(gate_queue(name), arguments={**HELD_ARGUMENTS, **limit})


def pause_marker(name: str) -> Declaration:
    """An empty queue that says by being there that another one is paused; a quorum queue, to outlive a lost node."""
    return Declaration(f"{name}{PAUSED_SUFFIX}", arguments=dict(_QUORUM))


def task_declaration(queue: Queue) -> Declaration:
    """What a queue is declared as when it does not exist."""
    kind = _KINDS[queue.kind]
    if queue.max_length is None:
        return Declaration(queue.name, arguments=dict(kind))
    limit = {"x-max-length": queue.max_length, "x-overflow": "reject-publish"}
    return Declaration(queue.name, arguments={**kind, **limit})


def dead_declaration(name: str) -> Declaration:
    return Declaration(dead_queue(name), arguments=dict(_DEAD_ARGUMENTS))


_INEQUIVALENT = re.compile(r"inequivalent arg '(?P<name>[^']+)' .*? but current is (?P<current>.+)$", re.DOTALL)
_TYPED = re.compile(r"the value '(?P<value>.*)' of type '(?P<type>\w+)'$", re.DOTALL)
_INTEGERS = frozenset({"byte", "unsignedbyte", "short", "unsignedshort", "signedint", "unsignedint", "long"})


def read_difference(text: str) -> Difference | None:
    """The difference in a PRECONDITION_FAILED reply (the texts of RabbitMQ 3.10 to 4.3); None for another text."""
    found = _INEQUIVALENT.search(text)
    return None if found is None else Difference(found["name"], _read_value(found["current"]))


def _read_value(text: str) -> Any:
    if text == "none":
        return None
    typed = _TYPED.match(text)
    if typed is None:
        value = text.strip("'")
        if value in ("true", "false"):
            return value == "true"
        return int(value) if value.lstrip("-").isdigit() else value
    if typed["type"] in _INTEGERS:
        return int(typed["value"])
    return typed["value"] == "true" if typed["type"] == "bool" else typed["value"]


def closer(guess: Declaration, difference: Difference) -> Declaration:
    """The guess, mended by what the broker said about the queue that is there."""
    if difference.name == "durable":
        return Declaration(guess.name, durable=bool(difference.current))
    if difference.name == "auto_delete":
        return Declaration(guess.name, auto_delete=bool(difference.current))
    arguments = {name: value for name, value in guess.arguments.items() if name != difference.name}
    if difference.current is not None:
        arguments[difference.name] = difference.current
    return msgspec.structs.replace(guess, arguments=arguments)


def judge(queue: Queue, found: Declaration) -> list[str]:
    """What an existing queue lacks, for the log. Raises QueueMismatch when it cannot do what is wanted."""
    wanted = task_declaration(queue)
    kind = found.arguments.get("x-queue-type", "classic")
    problem = None
    if not found.durable:
        problem = "tasks in it would not survive a restart: declare it durable, or use another name"
    elif found.auto_delete:
        problem = "it is deleted with its tasks when the last consumer leaves: use another name"
    elif kind == "stream":
        problem = "a stream is no work queue: use another name"
    elif queue.max_length is not None and not _limits(found, queue.max_length):
        problem = "RabbitMQ cannot change a queue's length limit: delete the empty queue, or use another name"
    if problem is not None:
        raise QueueMismatch(queue.name, found=found.described(), wanted=wanted.described(), remedy=problem)
    return _shortcomings(queue, found, kind)


def refuses(found: Declaration) -> bool:
    """Whether a queue refuses what is over a limit of its arguments."""
    limits = found.arguments.keys() & {"x-max-length", "x-max-length-bytes"}
    return bool(limits) and str(found.arguments.get("x-overflow", "")).startswith("reject-publish")


def _limits(found: Declaration, max_length: int) -> bool:
    return refuses(found) and found.arguments.get("x-max-length") == max_length


def _shortcomings(queue: Queue, found: Declaration, kind: str) -> list[str]:
    lacks = []
    if kind == "classic" and queue.kind == "quorum":
        lacks.append("it is a classic queue: not replicated, and returns of a task are not counted")
    if kind == "quorum" and queue.kind == "classic":
        lacks.append("it is a quorum queue, and a classic one was asked for")
    return [*lacks, *(f"{argument} lets RabbitMQ drop tasks" for argument in _lossy(found))]


def judge_dead(found: Declaration) -> list[str]:
    """What an existing dead-letter queue lacks, for the log."""
    lacks = []
    if not found.durable or found.auto_delete:
        lacks.append("dead letters in it do not survive a restart, or its last reader; delete it, and it is made anew")
    elif found.arguments.get("x-queue-type", "classic") == "classic":
        lacks.append("it is a classic queue: its dead letters are not replicated")
    return [*lacks, *(f"{argument} lets RabbitMQ drop dead letters" for argument in _lossy(found))]


def _lossy(found: Declaration) -> list[str]:
    """The arguments of a queue that let RabbitMQ drop messages."""
    rejects = str(found.arguments.get("x-overflow", "")).startswith("reject-publish")
    limits = {name: found.arguments[name] for name in _LOSSY if name in found.arguments}
    # A negative delivery limit is none (RabbitMQ 4.0 and later), and our own is as good as none.
    return [
        f"{name}={limit!r}"
        for name, limit in limits.items()
        if not (rejects and name.startswith("x-max-length"))
        and not (isinstance(limit, int) and (limit < 0 or limit == _DEAD_ARGUMENTS["x-delivery-limit"]))
    ]


class Priorities(msgspec.Struct, frozen=True):
    """What a queue makes of priorities, for the log, and whether that is all that was asked for."""

    text: str
    complete: bool


def expires_in_order(version: tuple[int, ...]) -> bool:
    """Whether messages of mixed priorities in a queue with one TTL leave it when they expire.

    From 4.0 to 4.2 only the first message of both levels together is looked at, and it may be a younger one.
    """
    return not _TWO_LEVELS <= version < _STRICT


def judge_priorities(queue: Queue, found: Declaration, version: tuple[int, ...]) -> Priorities:
    """What the queue that was found, or made, makes of priorities on a server of that version."""
    if found.arguments.get("x-queue-type", "classic") == "classic":
        return _judge_classic_priorities(queue, found.arguments.get("x-max-priority"))
    server = f"RabbitMQ {'.'.join(map(str, version))}"
    if version >= _STRICT:
        return Priorities(f"priorities are strict (a quorum queue on {server})", complete=True)
    remedy = "upgrade to 4.3, or have a classic queue under another name: Queue(..., kind='classic')"
    if version >= _TWO_LEVELS:
        text = f"{server} knows two priorities in a quorum queue, above 4 and the rest, and takes two to one"
    else:
        text = f"{server} ignores priorities in a quorum queue"
    return Priorities(f"{text}; {remedy}", complete=False)


def _judge_classic_priorities(queue: Queue, most: object) -> Priorities:
    if not isinstance(most, int) or most < 1:
        text = "it is a classic queue without x-max-priority, which ignores priorities; it cannot be changed"
        return Priorities(f"{text}: delete it when it is empty, or use another name", complete=False)
    if most < MAX_PRIORITY:
        text = f"it is a classic queue with x-max-priority={most}, so a higher priority counts as {most}"
        return Priorities(text, complete=False)
    if queue.kind != "classic":
        text = (
            "it is a classic queue, where a task without a priority counts as 0; Queue(..., kind='classic') makes it 4"
        )
        return Priorities(text, complete=False)
    return Priorities(f"priorities are strict (a classic queue with x-max-priority={most})", complete=True)
