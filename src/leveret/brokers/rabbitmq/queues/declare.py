"""Making queues, or adopting those that exist. A question has its channel to itself: a refusal closes it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast
from weakref import WeakKeyDictionary

from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues.topology import (
    CONTROL_EXCHANGE,
    DELAY_STEPS,
    FEW_STEPS,
    FIRST_CLOSER_STEP,
    FIRST_STEP,
    Declaration,
    Priorities,
    closer,
    dead_declaration,
    dead_queue,
    delay_declaration,
    delay_queue,
    gate_queue,
    judge,
    judge_dead,
    judge_priorities,
    pause_marker,
    read_difference,
    refuses,
    scratch_queue,
    task_declaration,
)
from leveret.errors import BrokerUnavailable, QueueMismatch, QueueNotFound
from leveret.model import Removed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from leveret.brokers.rabbitmq.amqp import Limits
    from leveret.model import Queue

T = TypeVar("T")

log = logging.getLogger("leveret.rabbitmq")

#: A queue has at most about twenty known arguments; each answer tells one of them.
_MOST_QUESTIONS = 24
#: RabbitMQ writes down the name of a new quorum queue up to a second later (ra's names.dets: its auto_save of 500 ms
#: waits for a second tick). A node that is killed before that forgets what the queue confirmed, so a queue that was
#: just made is not used for so long (seconds).
_REMEMBERED = 2.0
#: How many questions are on their way together, each on a channel of its own, of which a server may allow few.
_AT_ONCE = 8
#: Scratch queues have names that nobody else makes now.
_SCRATCHES = 10**9
#: How long a stream that was just made is left alone (seconds).
_NEW_STREAM = 1.0
#: A year: a worker that lives has a reason to hold its tasks, however long they run (milliseconds).
_NEVER = 366 * 86_400 * 1_000


#: See `_flights`.
_making: WeakKeyDictionary[amqp.Connection, Flights[str]] = WeakKeyDictionary()


class OnceLogger:
    """What was found out about queues; each is logged once, however often they are declared."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._told: set[tuple[str, str]] = set()
        self._limits = limits

    def found(self, queue: Declaration) -> None:
        if self._limits is not None and refuses(queue):
            self._limits.add(queue.name)

    def warn(self, queue: str, lack: str) -> None:
        if self._is_new(queue, lack):
            log.warning("queue %r is used as it is: %s", queue, lack)

    def warn_of_priorities(self, queue: str, priorities: Priorities) -> None:
        if self._is_new(queue, priorities.text):
            level = logging.INFO if priorities.complete else logging.WARNING
            log.log(level, "queue %r: %s", queue, priorities.text)

    def warn_of_refusal(self, lack: str, error: amqp.ChannelAccessRefused) -> None:
        if self._is_new("", lack):
            log.warning("%s, for want of a permission: %s", lack, error)

    def _is_new(self, queue: str, text: str) -> bool:
        known = (queue, text) in self._told
        self._told.add((queue, text))
        return not known


async def declare(
    connection: amqp.Connection, queues: Sequence[Queue], notes: OnceLogger, *, dead: bool
) -> tuple[float, dict[str, Declaration]]:
    """Make or adopt task queues, and their dead-letter queues (``dead``).

    How long not to use them yet (seconds), and what the task queues are, by name. All that exist are examined before
    the first missing one is made. Raises QueueMismatch or QueueNotFound.
    """
    async with aclosing(Look(connection)) as look:
        found = await _existing(look, queues, notes)
        missing = [task_declaration(queue) for queue in queues if queue.name not in found]
        making = [*missing, *(await _missing_dead(look, [queue.name for queue in queues], notes) if dead else [])]
    await together([partial(_make, connection, declaration) for declaration in making])
    return _REMEMBERED if making else 0.0, found | {one.name: one for one in missing}


def warn_of_priorities(
    connection: amqp.Connection, queues: Sequence[Queue], found: Mapping[str, Declaration], notes: OnceLogger
) -> None:
    """Log what becomes of priorities in those of the queues whose tasks have some."""
    version = amqp.server_version(connection)
    for queue in queues:
        if queue.priorities or queue.kind == "classic":
            notes.warn_of_priorities(queue.name, judge_priorities(queue, found[queue.name], version))


def consumer_arguments(connection: amqp.Connection, found: Declaration) -> dict[str, Any]:
    """What to consume a queue with. A quorum queue of RabbitMQ 4.3 lets a consumer choose a timeout, others refuse."""
    if amqp.server_version(connection) < (4, 3):
        return {}
    return {"x-consumer-timeout": _NEVER} if found.arguments.get("x-queue-type") == "quorum" else {}


def steady_arguments(connection: amqp.Connection) -> dict[str, Any]:
    """What to consume a quorum queue with whose messages are held for long; before 4.3 its node's timeout counts."""
    return {"x-consumer-timeout": _NEVER} if amqp.server_version(connection) >= (4, 3) else {}


def has_single_active_consumer(found: Declaration) -> bool:
    """Whether the queue deals to one consumer alone, and to the next one when that is gone: its maker decided so."""
    return bool(found.arguments.get("x-single-active-consumer"))


async def declare_delays(connection: amqp.Connection, steps: Sequence[tuple[str, int]]) -> None:
    """Make delay queues: of which task queue, and of how many milliseconds. They may be used at once.

    Raises QueueNotFound when there is no task queue.
    """
    wanted = [delay_declaration(home, step) for home, step in steps]
    missing = await _missing(connection, [declaration.name for declaration in wanted])
    if not missing:
        return
    homes = list(dict.fromkeys(home for (home, _), one in zip(steps, wanted, strict=True) if one.name in missing))
    for home in await _missing(connection, homes):
        raise QueueNotFound(f"queue {home!r} does not exist, so nothing can be delayed for it; declare it first")
    await together([partial(_make, connection, one) for one in wanted if one.name in missing])
    await have_names_written(connection, homes[0])


async def _missing(connection: amqp.Connection, names: Sequence[str]) -> set[str]:
    """Those of the queues that are not there."""
    async with aclosing(Look(connection)) as look:
        counts = await together([partial(look.message_count, name) for name in names])
    return {name for name, count in zip(names, counts, strict=True) if count is None}


async def together(questions: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Ask several questions, some at a time; the answers in their order. Raises the first error in that order."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def ask(question: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with slots:
            return await question()

    # All are waited for: one that goes on behind an error would use a channel that nobody closes.
    answers = await asyncio.gather(*map(ask, questions), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return cast("list[T]", answers)


async def have_names_written(connection: amqp.Connection, queue: str) -> None:
    """Have the server write down the names of queues that were just made, so that it knows them when it is killed.

    Before it makes a queue it looks the name up in ra's table of names, which writes all that is new there to its file
    (ADR 0035). So one more queue is made, and deleted: beside a task queue, where its user may.
    """
    scratch = scratch_queue(queue, secrets.randbelow(_SCRATCHES))
    await _make(connection, scratch)
    await _deleted(connection, scratch.name)


async def require_queue(connection: amqp.Connection, queue: str) -> None:
    """Raises QueueNotFound."""
    if await message_count(connection, queue) is None:
        raise QueueNotFound(f"queue {queue!r} does not exist")


async def is_paused(connection: amqp.Connection, queue: str) -> bool:
    """Whether one of the two marks is there: a policy may expire the queue, and an older version makes no exchange."""
    async with aclosing(Look(connection)) as look:
        marker = pause_marker(queue).name
        return await look.has_exchange(marker) or await look.message_count(marker) is not None


async def has_exchanges(connection: amqp.Connection, names: Sequence[str]) -> list[bool]:
    """Which of them are there; of what this user may not look at, none."""
    async with aclosing(Look(connection)) as look:

        async def is_there(name: str) -> bool:
            with suppress(amqp.ChannelAccessRefused):
                return await look.has_exchange(name)
            return False

        return await together([partial(is_there, name) for name in names])


async def mark_paused(connection: amqp.Connection, queue: str) -> None:
    """Raises QueueNotFound: a pause of a queue that is not there is a misspelt one."""
    if await message_count(connection, queue) is None:
        raise QueueNotFound(f"queue {queue!r} does not exist, so it cannot be paused")
    marker = pause_marker(queue)
    if await message_count(connection, marker.name) is None:
        await _make(connection, marker)
    await _make_exchange(connection, marker.name)


async def unmark_paused(connection: amqp.Connection, queue: str) -> None:
    """Raises QueueNotFound when there is neither such a queue nor a pause that it left behind."""
    if await is_paused(connection, queue):
        marker = pause_marker(queue).name
        channel = await amqp.open_channel(connection, confirms=False)
        await channel.queue_delete(marker)
        await channel.exchange_delete(marker)
        await channel.close()
    elif await message_count(connection, queue) is None:
        raise QueueNotFound(f"queue {queue!r} does not exist, so there is nothing to resume")


async def purge_queue(connection: amqp.Connection, queue: str) -> Removed:
    """Delete what waits in a task queue, and what waits to go there, which comes first."""
    delayed = [
        await _emptied(connection, name)
        for name in [delay_queue(queue, milliseconds) for milliseconds in DELAY_STEPS]
        if await message_count(connection, name) is not None
    ]
    gate = gate_queue(queue)
    limited = 0 if await message_count(connection, gate) is None else await _emptied(connection, gate)
    return Removed(await _emptied(connection, queue) + limited, sum(delayed))


async def delete_queue(connection: amqp.Connection, queue: str) -> Removed:
    """Delete a task queue and what belongs to it; the queue last, so that it can be asked for again until then."""
    delayed = [await _deleted(connection, delay_queue(queue, milliseconds)) for milliseconds in DELAY_STEPS]
    dead = await _deleted(connection, dead_queue(queue))
    if await is_paused(connection, queue):
        await unmark_paused(connection, queue)
    limited = await _deleted(connection, gate_queue(queue))
    return Removed(await _deleted(connection, queue) + limited, sum(delayed), dead)


async def _emptied(connection: amqp.Connection, name: str) -> int:
    channel = await amqp.open_channel(connection, confirms=False)
    answer = await channel.queue_purge(name)
    await channel.close()
    return answer.message_count or 0


async def _deleted(connection: amqp.Connection, name: str) -> int:
    """How many messages were in it; 0 as well for a queue that is not there."""
    channel = await amqp.open_channel(connection, confirms=False)
    answer = await channel.queue_delete(name)
    await channel.close()
    return answer.message_count or 0


async def make_control_exchange(connection: amqp.Connection) -> bool:
    """Make the exchange, or find it: a user who may not make one may still use it. Whether it was made."""
    was_made = False

    async def make(_: Sequence[str]) -> None:
        nonlocal was_made
        was_made = await _make_exchange(connection, CONTROL_EXCHANGE)

    await _flights(connection).join((CONTROL_EXCHANGE,), make)
    return was_made


async def _make_exchange(connection: amqp.Connection, name: str) -> bool:
    async with aclosing(Look(connection)) as look:
        if await look.has_exchange(name):
            return False
    channel = await amqp.open_channel(connection, confirms=False)
    await channel.exchange_declare(name, exchange_type="fanout", durable=True)
    await channel.close()
    return True


async def make_stream(connection: amqp.Connection, stream: Declaration) -> None:
    """Make a stream, or find it: a user who may not make one may still use it, and an operator's limits stay.

    RabbitMQ 3.10 closes the connection of whoever publishes to a stream that was just made (506, "Stream not found").
    """

    async def make(_: Sequence[str]) -> None:
        if await message_count(connection, stream.name) is None:
            await _make(connection, stream)
            await asyncio.sleep(_NEW_STREAM)

    await _flights(connection).join((stream.name,), make)


async def make_queues(
    connection: amqp.Connection, declarations: Sequence[Declaration], *, scratch_beside: str | None = None
) -> None:
    """Make those of these quorum queues that are missing. They may be used afterwards.

    ``scratch_beside``: see `have_names_written`; without one it takes a while.
    """
    missing = await _missing(connection, [declaration.name for declaration in declarations])
    await together([partial(_make, connection, one) for one in declarations if one.name in missing])
    if missing and scratch_beside is not None:
        await have_names_written(connection, scratch_beside)
    else:
        await asyncio.sleep(_REMEMBERED if missing else 0.0)


def _flights(connection: amqp.Connection) -> Flights[str]:
    """What is being made on a connection, by name: once for all who want it."""
    return _making.setdefault(connection, Flights())


async def _existing(look: Look, queues: Sequence[Queue], notes: OnceLogger) -> dict[str, Declaration]:
    """Those that are there, by name. Raises QueueMismatch or QueueNotFound."""

    async def find(queue: Queue) -> Declaration | None:
        if await look.message_count(queue.name) is None:
            if not queue.create:
                raise QueueNotFound(f"queue {queue.name!r} does not exist, and create=False forbids to make it")
            return None
        found = await look.examine(task_declaration(queue))
        for lack in judge(queue, found):
            notes.warn(queue.name, lack)
        notes.found(found)
        return found

    return {one.name: one for one in await together([partial(find, queue) for queue in queues]) if one is not None}


async def _missing_dead(look: Look, names: Sequence[str], notes: OnceLogger) -> list[Declaration]:
    async def is_missing(wanted: Declaration) -> bool:
        if await look.message_count(wanted.name) is None:
            return True
        with suppress(amqp.ChannelAccessRefused):
            for lack in judge_dead(await look.examine(wanted)):
                notes.warn(wanted.name, lack)
        return False

    declarations = list(map(dead_declaration, names))
    missing = await together([partial(is_missing, one) for one in declarations])
    return [one for one, is_not_there in zip(declarations, missing, strict=True) if is_not_there]


async def message_count(connection: amqp.Connection, name: str) -> tuple[int, int] | None:
    """How many messages are ready in a queue and how many consumers it has; None when it does not exist."""
    async with aclosing(Look(connection)) as look:
        return await look.message_count(name)


class Look:
    """Asks what is there, on channels that it keeps: as many as are asked on at once, and each until a refusal."""

    def __init__(self, connection: amqp.Connection) -> None:
        self._connection = connection
        self._idle: list[amqp.Channel] = []

    async def message_count(self, name: str) -> tuple[int, int] | None:
        """How many messages are ready in a queue and how many consumers it has; None when it does not exist."""
        channel = await self._channel()
        try:
            answer = await channel.queue_declare(name, passive=True)
        except amqp.ChannelNotFoundEntity:
            return None
        except amqp.ChannelLockedResource:
            raise QueueMismatch(
                name,
                found={"exclusive": True},
                wanted={"exclusive": False},
                remedy="it belongs to another connection alone: use another name",
            ) from None
        self._idle.append(channel)
        return answer.message_count or 0, answer.consumer_count or 0

    async def settled_count(self, name: str) -> tuple[int, int] | None:
        """The same; a quorum queue that is slow to answer says 0 and 0, so that is asked again."""
        count = await self.message_count(name)
        return count if count != (0, 0) else await self.message_count(name)

    async def waiting(self, queue: str) -> dict[int, int | None]:
        """How many messages wait in each of a task queue's delay queues (by milliseconds); None: there is no such.

        Whoever makes one makes the first steps too (`steps_made_with`), so that few are asked for.
        """
        steps = (*FEW_STEPS, FIRST_CLOSER_STEP)
        found = {step: await self.message_count(delay_queue(queue, step)) for step in steps}
        is_torn = found[FIRST_STEP] is None and any(found.values())
        if is_torn or found[FIRST_CLOSER_STEP] is not None:
            for step in DELAY_STEPS:
                if step not in found:
                    found[step] = await self.message_count(delay_queue(queue, step))
        return {step: None if count is None else count[0] for step, count in found.items()}

    async def pause_marks(self, queue: str) -> tuple[bool, bool]:
        """Whether the exchange, and the queue, are there that mark a pause."""
        marker = pause_marker(queue).name
        return await self.has_exchange(marker), await self.message_count(marker) is not None

    async def has_exchange(self, name: str) -> bool:
        """Whether there is such a fanout exchange."""
        channel = await self._channel()
        try:
            await channel.exchange_declare(name, exchange_type="fanout", passive=True)
        except amqp.ChannelNotFoundEntity:
            return False
        self._idle.append(channel)
        return True

    async def examine(self, wanted: Declaration) -> Declaration:
        """What an existing queue was declared as: guess, and mend the guess by what RabbitMQ says against it."""
        guess = wanted
        for _ in range(_MOST_QUESTIONS):
            refusal = await self._refusal(guess)
            if refusal is None:
                return guess
            difference = read_difference(refusal)
            if difference is None:
                raise BrokerUnavailable(f"RabbitMQ refused queue {wanted.name!r}: {refusal}")
            guess = closer(guess, difference)
            if difference.name in ("durable", "auto_delete") or difference.current == "stream":
                return guess  # it can't be used, and RabbitMQ may refuse to be asked more about such a queue
        return guess

    async def _refusal(self, declaration: Declaration) -> str | None:
        channel = await self._channel()
        try:
            await _send(channel, declaration)
        except amqp.ChannelPreconditionFailed as error:
            return str(error.args[0] if error.args else error)
        self._idle.append(channel)
        return None

    async def aclose(self) -> None:
        while self._idle:
            await self._idle.pop().close()

    async def _channel(self) -> amqp.Channel:
        while self._idle:
            channel = self._idle.pop()
            if not channel.is_closed:
                return channel
        return await amqp.open_channel(self._connection, confirms=False)


async def examine(connection: amqp.Connection, wanted: Declaration) -> Declaration:
    """See `Look.examine`."""
    async with aclosing(Look(connection)) as look:
        return await look.examine(wanted)


async def _make(connection: amqp.Connection, declaration: Declaration) -> None:
    channel = await amqp.open_channel(connection, confirms=False)
    await _send(channel, declaration)
    await channel.close()


async def _send(channel: amqp.Channel, declaration: Declaration) -> None:
    await channel.queue_declare(
        declaration.name,
        durable=declaration.durable,
        auto_delete=declaration.auto_delete,
        arguments=declaration.arguments or None,
    )
