"""Who admits tasks while this program holds the table of limits: decides with `Gate`, and carries it out.

See docs/adr/0042. The tasks that wait are in queues of their own, which the holder consumes; to admit one is to publish
it to its task queue, with its permit as a row of the table.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from leveret.brokers.base import no_limit
from leveret.brokers.gate import Gate, Permit, Permits
from leveret.brokers.rabbitmq.coordination import Ride, TenureLost
from leveret.brokers.rabbitmq.queues import Waiting, admitted, gate_queue, waiting
from leveret.errors import BrokerError, ConfigurationError, LimitNotFound
from leveret.model import (
    DeclareLimits,
    LimitRow,
    PauseLimit,
    RemoveLimit,
    RestLimit,
    ResumeLimit,
    SetLimit,
    decoded,
    limits_after,
    queue_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

    from leveret.brokers.rabbitmq.amqp import Incoming
    from leveret.brokers.rabbitmq.coordination import Request, Side, Tenure
    from leveret.errors import EnqueueError
    from leveret.model import LimitRef, LimitRequest, LimitUse

log = logging.getLogger("leveret.rabbitmq.limits")

#: Of each queue, how many of the tasks that wait are known; fairness is among these.
WINDOW = 2_000
#: Most tasks of a queue that are admitted and have not ended, whatever its limits say; in one that serves several in
#: turn, each further one would stand behind them all.
_MOST, _MOST_FAIR = 2_000, 200
#: The same of all queues: each is a row.
_MOST_PERMITS = 8_000
#: An end is forgotten so long after its row was dropped (seconds): until then it comes again to the next holder, which
#: may be given the row once more.
_REMEMBERED = 2.0
#: How many stays that ended are known, in case that a message comes back.
_MOST_ENDED = 20_000
#: A queue that refuses is left alone for so long (seconds).
_REFUSED = 1.0
#: How often it is looked for queues that are not consumed yet (seconds).
_LOOK = 1.0
#: What waits is taken anew when it was held for so long (seconds): before RabbitMQ 4.3 a message that is held keeps its
#: queue's log on disk, and its consumer is closed after half an hour.
_ANEW = 900.0
#: So often it is looked whether somebody takes a queue's tasks (seconds).
_WATCH = 0.2
#: Most tasks that stand in their queue while those with a rate are admitted; of a fast one as many as start in half a
#: second.
_MOST_AHEAD = 20
#: So often permits whose tasks are nowhere are looked for (seconds).
_STOCK = 30.0
#: The keys of rows: limits, permits, and queues whose tasks may wait.
_LIMIT, _PERMIT, _QUEUE, _RATE = "l", "p", "q", "r"
#: A rate with so long between two starts (seconds) has a row with when it may start again: a new holder that did not
#: know would wait so long. So many have one at most.
_SLOW = 1.0
_MOST_RATES = 2_000
#: Most limits, and queues that have some.
_MOST_LIMITS = 1_000


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


class _Stored(msgspec.Struct, frozen=True, array_like=True):
    """A permit's row."""

    id: str
    stay: str
    queue: str
    refs: list[tuple[str, str]]


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
Count: TypeAlias = "Callable[[str], Awaitable[tuple[int, int] | None]]"
LookInto: TypeAlias = "Callable[[str], Awaitable[Emptied | None]]"
_Inline: TypeAlias = AskAlive | AskUses | AskHeld | Clear | Emptied
_INLINE = (AskAlive, AskUses, AskHeld, Clear, Emptied)


class _SlowRate(msgspec.Struct, frozen=True, array_like=True):
    """A slow rate's row: see `leveret.model.Rate.started`."""

    limit: str
    key: str
    full_at: float


_request_of = msgspec.msgpack.Decoder(Asked).decode
_row_of = msgspec.json.Decoder(LimitRow).decode
_stored_of = msgspec.msgpack.Decoder(_Stored).decode
_pack = msgspec.msgpack.Encoder().encode
_rate_of = msgspec.msgpack.Decoder(_SlowRate).decode
_pack_row = msgspec.json.Encoder().encode


class _Task(NamedTuple):
    """A task that waits, as it was delivered."""

    window: _Window
    message: Incoming
    id: str
    stay: str


class _Window:
    """What was delivered of one queue where tasks wait, and is not acknowledged."""

    def __init__(self, queue: str, now: float) -> None:
        self.queue = queue
        self.since = now
        self.side: Side | None = None
        #: The limits of its tasks.
        self.limits = {queue_limit(queue)}
        #: In the order of the tags.
        self._tags: dict[int, None] = {}
        #: Whether somebody takes tasks of the queue, and how many of them stood in it, when that was last looked at
        #: (the loop's time).
        self.is_taken = False
        self.ready = 0
        self.seen_at = float("-inf")
        #: How many of those that were admitted workers had then.
        self.taken = 0
        #: Tasks that were admitted since.
        self.admitted = 0
        self._settled: list[int] = []
        self._flush: asyncio.Handle | None = None

    @property
    def is_closed(self) -> bool:
        return self.side is None or self.side.is_closed

    @property
    def held(self) -> int:
        """How many."""
        return len(self._tags)

    def hold(self, tag: int) -> None:
        self._tags[tag] = None

    def settle(self, tag: int) -> None:
        """It leaves its queue."""
        if tag in self._tags:
            del self._tags[tag]
            self._settled.append(tag)
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_soon(self._acknowledge)

    def _acknowledge(self) -> None:
        self._flush = None
        settled, self._settled = self._settled, []
        if self.side is not None:
            self.side.acknowledge(settled, next(iter(self._tags), None))


class Admission:
    """The limits while this program holds the table.

    ``count``: how many messages are ready in a queue, and how many consumers it has; None: there is no such queue.
    ``look``: what workers have of a queue that is empty; None: that is not known, or it is not empty.
    """

    def __init__(self, tenure: Tenure, count: Count, look: LookInto | None = None) -> None:
        self._tenure = tenure
        self._count = count
        self._look_into = look
        self._gate: Gate[_Task] = Gate(Permits(time.time(), _SLOW))
        self._permits = self._gate.permits
        self._windows: dict[str, _Window | None] = {}
        self._numbers = itertools.count(1)
        #: The permit of each stay that has led to one.
        self._permit_of: dict[str, str] = {}
        #: The rows of permits.
        self._rows: dict[str, _Stored] = {}
        #: Permits of this tenure whose tasks are known to be in their queues; and of others the messages that are kept
        #: until that is known, or the task has ended.
        self._known: set[str] = set()
        self._originals: dict[str, list[_Task]] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        #: Queues that serve several in turn.
        self._fair: set[str] = set()
        #: Until when a queue is left alone (Unix time).
        self._off: dict[str, float] = {}
        #: Queues of which it was said that what waits cannot be taken.
        self._refused: set[str] = set()
        #: Slow rates that have a row, and when a whole burst of each may start.
        self._rates: dict[LimitRef, float] = {}
        self._changed = asyncio.Event()
        self._new_queue = asyncio.Event()
        self._turn = asyncio.Lock()
        self._load(tenure.rows)

    def _load(self, rows: Mapping[str, bytes]) -> None:
        limits = [decoded(_row_of, value) for key, value in rows.items() if key.startswith(_LIMIT)]
        self._gate.define({row.name: row for row in limits if row is not None})
        for key, value in rows.items():
            if key.startswith(_QUEUE):
                self._windows[key[1:]] = None
            elif key.startswith(_RATE) and (rate := decoded(_rate_of, value)) is not None:
                self._rates[rate.limit, rate.key] = rate.full_at
                self._permits.restore_rate((rate.limit, rate.key), rate.full_at)
            elif key.startswith(_PERMIT) and (stored := decoded(_stored_of, value)) is not None:
                self._note(key[1:], stored)
                self._permits.restore(key[1:], Permit(stored.queue, tuple(stored.refs)))

    def _note(self, permit: str, stored: _Stored) -> None:
        self._rows[permit] = stored
        if stored.stay:
            self._permit_of[stored.stay] = permit

    # What runs

    async def run(self) -> None:
        """Until the tenure is over: raises an exception group with TenureLost."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._consume())
            group.create_task(self._admit())
            group.create_task(self._watch())
            if self._look_into is not None:
                group.create_task(self._take_stock(self._look_into))
            group.create_task(self._take_requests(group))

    async def _take_requests(self, group: asyncio.TaskGroup) -> None:
        async for request in self._tenure:
            body = decoded(_request_of, request.body)
            if isinstance(body, Ended):
                self._end(body.permits)
                asyncio.get_running_loop().call_later(_REMEMBERED, request.done)
            elif isinstance(body, _INLINE):
                request.answer(self._told(body))
                request.done()
            elif body is None:
                log.warning("a request that this release does not know is left out: %r", request.body[:100])
                request.done()
            else:
                group.create_task(self._answer(request, body))

    async def _answer(self, request: Request, body: LimitRequest | Serve) -> None:
        with suppress(TenureLost):
            try:
                await self.do(body)
                answer = Answer()
            except (LimitNotFound, ConfigurationError) as error:
                answer = Answer(type(error).__name__, str(error))
            request.answer(_pack(answer))
            request.done()

    def _told(self, question: _Inline) -> bytes:
        if isinstance(question, AskUses):
            return _pack(self._gate.uses())
        return _pack(self._answered(question))

    def _answered(self, question: AskAlive | AskHeld | Clear | Emptied) -> Answer:
        match question:
            case AskAlive(permits):
                return Answer(alive=[permit for permit in permits if permit in self._permits.held])
            case AskHeld():
                return Answer(held={queue: window.held for queue, window in self._windows.items() if window})
            case Clear(queue):
                return Answer(held={queue: self._clear(queue)})
            case Emptied():
                self._free(question)
                return Answer()

    def _clear(self, queue: str) -> int:
        """What waits of a queue, and is here, is gone; how many that were."""
        tasks = self._gate.clear(queue)
        for task in tasks:
            task.window.settle(task.message.tag)
        return len(tasks)

    def _free(self, emptied: Emptied) -> None:
        """Tasks of a queue that were admitted are gone. Where it cannot be told which, `_take_stock` may find out."""
        here = [one for one, row in self._rows.items() if row.queue == emptied.queue and not self._is_on_the_way(one)]
        self._end(self._missing(here, emptied))

    def _is_on_the_way(self, permit: str) -> bool:
        return permit in self._originals and permit.startswith(f"{self._tenure.epoch}.")

    async def answer(self, request: Asked) -> Answer:
        """For a program that holds the table for this alone. Raises LimitNotFound."""
        if isinstance(request, AskAlive | AskHeld | Clear | Emptied):
            return self._answered(request)
        assert not isinstance(request, AskUses | Ended)
        await self.do(request)
        return Answer()

    async def do(self, request: LimitRequest | Serve) -> None:
        """Raises LimitNotFound, ConfigurationError."""
        async with self._turn:
            queues = request.queues if isinstance(request, (DeclareLimits, Serve)) else ()
            rows: dict[str, bytes | None] = {_QUEUE + name: b"" for name in queues if name not in self._windows}
            limits: Mapping[str, LimitRow | None] = {}
            if not isinstance(request, Serve):
                found = limits_after(request, self._permits.rows, time.time())
                if found is None:
                    raise no_limit(request)
                limits = found
                rows |= {_LIMIT + name: None if row is None else _pack_row(row) for name, row in limits.items()}
            if len(self._permits.rows) + len(self._windows) + len(rows) > _MOST_LIMITS:
                raise ConfigurationError(f"RabbitMQ keeps at most {_MOST_LIMITS} limits, and queues that have some")
            if rows:
                await self._tenure.change(rows)
            for name in queues:
                self._windows.setdefault(name, None)
            self._gate.define(limits)
        self._changed.set()
        self._new_queue.set()

    # What waits

    async def _consume(self) -> None:
        """Consume what is not consumed, and what was held for long anew."""
        while True:
            for queue, window in list(self._windows.items()):
                if window is not None and time.monotonic() - window.since > _ANEW and window.side is not None:
                    await window.side.close()
                if window is None or window.is_closed:
                    await self._try_to_open(queue)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await self._new_queue.wait()
            self._new_queue.clear()

    async def _try_to_open(self, queue: str) -> None:
        try:
            await self._open(queue)
            self._refused.discard(queue)
        except TenureLost:
            raise
        except BrokerError as error:
            if queue not in self._refused:
                self._refused.add(queue)
                log.warning("tasks of queue %r that wait for limits cannot be taken, and wait: %s", queue, error)

    async def _open(self, queue: str) -> None:
        self._gate.clear(queue)
        self._windows[queue] = None
        if await self._count(gate_queue(queue)) is None:
            return
        window = _Window(queue, time.monotonic())
        window.side = await self._tenure.consume(gate_queue(queue), WINDOW, partial(self._on_messages, window))
        self._windows[queue] = window

    def _on_messages(self, window: _Window, messages: list[Incoming]) -> None:
        for message in messages:
            window.hold(message.tag)
            self._take(window, message)
        self._changed.set()

    def _take(self, window: _Window, message: Incoming) -> None:
        found = waiting(message)
        task = _Task(window, message, found.id, found.stay)
        if found.stay in self._ended:
            window.settle(message.tag)
        elif (permit := self._permit_of.get(found.stay)) is not None:
            # It was admitted, and has come back. It stays until it is sure that its task is in its queue.
            if permit in self._known:
                window.settle(message.tag)
            else:
                self._originals.setdefault(permit, []).append(task)
        else:
            self._add(task, found)

    def _add(self, task: _Task, found: Waiting) -> None:
        """It waits."""
        if found.fair is not None:
            self._fair.add(task.window.queue)
        task.window.limits.update(name for name, _ in found.refs)
        permit = f"{self._tenure.epoch}.{next(self._numbers)}"
        self._gate.add(permit, task.window.queue, found.refs, found.fair, found.rank, task)

    # Who goes

    async def _admit(self) -> None:
        while True:
            now = time.time()
            for queue, window in list(self._windows.items()):
                if window is not None and window.is_taken and self._off.get(queue, 0.0) <= now:
                    await self._admit_some(queue, now)
            await self._wait()

    async def _wait(self) -> None:
        following = self._gate.next_time()
        seconds = _REFUSED if following is None else min(_REFUSED, max(0.0, following - time.time()))
        if not self._changed.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        self._changed.clear()

    async def _admit_some(self, queue: str, now: float) -> None:
        found = self._gate.admit(queue, self._room(queue), now)
        if not found:
            return
        if (window := self._windows.get(queue)) is not None:
            window.admitted += len(found)
        try:
            await self._keep_rates([ref for permit, _ in found for ref in self._permits.held[permit].refs], now)
            await self._tenure.enqueue_all([self._ride(queue, permit, task) for permit, task in found])
        except TenureLost:
            raise
        except BrokerError as error:
            log.warning("tasks of queue %r cannot be admitted now: %s", queue, error)
            for permit, task in found:
                self._put_back(permit, task)

    async def _keep_rates(self, refs: Iterable[LimitRef], now: float) -> None:
        """What slow rates have started is durable before it starts."""
        started = {ref: self._permits.full_at(ref) for ref in refs if self._is_slow(ref)}
        if not started:
            return
        over = [ref for ref, full_at in self._rates.items() if full_at <= now and ref not in started]
        self._rates.update(started)
        for ref in over:
            del self._rates[ref]
        rows: dict[str, bytes | None] = {_rate_key(ref): None for ref in over}
        if len(self._rates) <= _MOST_RATES:
            rows |= {_rate_key(ref): _pack(_SlowRate(*ref, full_at)) for ref, full_at in started.items()}
        await self._tenure.change(rows)

    def _is_slow(self, ref: LimitRef) -> bool:
        row = self._permits.rows.get(ref[0])
        return row is not None and row.rule.rate is not None and row.rule.rate.interval >= _SLOW

    def _room(self, queue: str) -> int:
        """How many more of a queue may be admitted, for all that its limits say."""
        window = self._windows.get(queue)
        fastest = None if window is None else self._fastest(window)
        most = _MOST
        if queue in self._fair:
            most = min(_MOST, max(_MOST_FAIR, _MOST_FAIR // 2 + (window.taken if window else 0)))
        room = min(most - self._permits.admitted[queue_limit(queue), ""], _MOST_PERMITS - len(self._permits.held))
        if window is None or fastest is None:
            return room
        ahead = max(_MOST_AHEAD, int(fastest * _LOOK / 2))
        return min(room, ahead - window.ready - (window.admitted if window.ready else 0))

    def _fastest(self, window: _Window) -> float | None:
        """How many tasks of a queue may start in a second by the fastest of their rates; None: they have none."""
        rows = (self._permits.rows.get(name) for name in window.limits)
        intervals = [row.rule.rate.interval for row in rows if row is not None and row.rule.rate is not None]
        return 1 / min(intervals) if intervals else None

    async def _watch(self) -> None:
        """Look whether somebody takes tasks of the queues of which some wait, and whether they stand there."""
        while True:
            for queue, window in list(self._windows.items()):
                if window is None or not window.held:
                    continue
                often = _WATCH if not window.is_taken or self._fastest(window) is not None else _LOOK
                if time.monotonic() - window.seen_at >= often:
                    with suppress(BrokerError):
                        await self._see(queue, window)
            await asyncio.sleep(_WATCH / 2)

    async def _see(self, queue: str, window: _Window) -> None:
        found = await self._count(queue)
        # A quorum queue that is slow to answer says 0 and 0.
        if found == (0, 0) and window.is_taken:
            found = await self._count(queue)
        was, window.is_taken = window.is_taken, found is not None and found[1] > 0
        window.ready, window.seen_at, window.admitted = found[0] if found else 0, time.monotonic(), 0
        window.taken = max(0, self._permits.admitted[queue_limit(queue), ""] - window.ready)
        if window.is_taken and (not was or window.ready == 0):
            self._changed.set()

    async def _take_stock(self, look: LookInto) -> None:
        """Free the permits of tasks that are nowhere: those that are not found at two looks, if it is sure which."""
        suspects: dict[str, frozenset[str]] = {}
        while True:
            await asyncio.sleep(_STOCK)
            for queue in {row.queue for row in self._rows.values()} | suspects.keys():
                before = [permit for permit, row in self._rows.items() if row.queue == queue]
                with suppress(BrokerError):
                    ready, _ = await self._count(queue) or (None, 0)
                    # With its queue a task is gone, whoever has it.
                    found = Emptied(queue, 0, []) if ready is None else None if ready else await look(queue)
                    gone = self._missing(before, found)
                    self._lose(queue, gone & suspects.pop(queue, frozenset()))
                    if gone:
                        suspects[queue] = gone

    def _missing(self, permits: Sequence[str], found: Emptied | None) -> frozenset[str]:
        """Those permits of a queue whose tasks workers do not have. ``found``: see `LookInto`."""
        here = [permit for permit in permits if permit in self._rows]
        if found is None or any(map(self._is_on_the_way, here)):
            return frozenset()
        running = frozenset(found.running)
        gone = frozenset(permit for permit in here if self._rows[permit].id not in running)
        return gone if len(gone) <= len(here) - found.taken else frozenset()

    def _lose(self, queue: str, permits: Collection[str]) -> None:
        """Their tasks are nowhere. One whose message is still here was not stored, and waits anew."""
        if not permits:
            return
        log.warning("%d permits of queue %r are freed: their tasks are nowhere", len(permits), queue)
        for permit in permits:
            kept = self._originals.pop(permit, [])
            self._forget(permit)
            for task in kept[1:]:
                task.window.settle(task.message.tag)
            for task in kept[:1]:
                self._add(task, waiting(task.message))
        self._tenure.drop([_PERMIT + permit for permit in permits])
        self._changed.set()

    def _ride(self, queue: str, permit: str, task: _Task) -> Ride:
        stored = _Stored(task.id, task.stay, queue, list(self._permits.held[permit].refs))
        self._note(permit, stored)
        self._originals[permit] = [task]
        message = admitted(task.message, queue, task.id, permit)
        return Ride(message, _PERMIT + permit, _pack(stored), partial(self._on_stored, permit, task))

    def _on_stored(self, permit: str, task: _Task, refusal: EnqueueError | None) -> None:
        if refusal is not None:
            log.info("task %s is not admitted now: %s", task.id, refusal)
            self._put_back(permit, task)
            return
        if permit in self._permits.held:
            self._known.add(permit)
        self._settle_originals(permit)

    def _settle_originals(self, permit: str) -> None:
        for task in self._originals.pop(permit, ()):
            task.window.settle(task.message.tag)

    def _put_back(self, permit: str, task: _Task) -> None:
        """It waits on, and is tried again."""
        queue = task.window.queue
        self._off[queue] = time.time() + _REFUSED
        held = self._permits.held.get(permit)
        self._forget(permit)
        self._originals.pop(permit, None)
        if held is None or self._windows.get(queue) is not task.window or task.window.is_closed:
            return
        self._add(task, waiting(task.message))

    # Who has ended

    def _end(self, permits: Iterable[str]) -> None:
        keys = []
        for permit in permits:
            if permit in self._permits.held:
                keys.append(_PERMIT + permit)
                stay = self._forget(permit)
                if stay:
                    self._ended[stay] = None
                self._settle_originals(permit)
        while len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        self._tenure.drop(keys)
        self._changed.set()

    def _forget(self, permit: str) -> str:
        """It is given back; the stay that led to it."""
        self._gate.end(permit)
        self._known.discard(permit)
        stored = self._rows.pop(permit, None)
        stay = "" if stored is None else stored.stay
        self._permit_of.pop(stay, None)
        return stay


def _rate_key(ref: LimitRef) -> str:
    return _RATE + _pack_row(ref).decode()


def uses_of(rows: Mapping[str, bytes]) -> list[LimitUse]:
    """What a table's rows tell of its limits: nobody admits tasks now, so what waits is not known."""
    limits = [decoded(_row_of, value) for key, value in rows.items() if key.startswith(_LIMIT)]
    gate: Gate[None] = Gate(Permits())
    gate.define({row.name: row for row in limits if row is not None})
    for key, value in rows.items():
        if key.startswith(_PERMIT) and (stored := decoded(_stored_of, value)) is not None:
            gate.permits.restore(key[1:], Permit(stored.queue, tuple(stored.refs)))
    return gate.uses()
