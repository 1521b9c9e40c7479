"""Schedules on RabbitMQ: rows of a fenced table. Whoever holds it stores what falls due, and answers who asks."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import msgspec

from leveret.brokers.base import no_schedule
from leveret.brokers.rabbitmq.coordination import MOST_RIDING, MOST_ROWS, TenureLost
from leveret.errors import BrokerUnavailable, ConfigurationError, LeveretError, QueueNotFound, ScheduleNotFound
from leveret.model import Change, Declare, Put, ScheduleRequest, ScheduleRow, advance, asked, decoded, steps, told_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence

    from leveret.brokers.base import ScheduleKeeper
    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.brokers.rabbitmq.coordination import FencedTable, Request, Tenure
    from leveret.brokers.rabbitmq.statuses import StatusLog
    from leveret.model import Envelope

log = logging.getLogger("leveret.rabbitmq.schedules")

ToMessage: TypeAlias = "Callable[[Envelope], Message]"

#: The table's name.
TABLE = "schedules"
#: How long whoever keeps the schedules may take to answer (seconds).
_ANSWER = 3.0
#: How often it is asked, and looked whether nobody keeps them.
_TRIES = 4
#: A task that was cancelled and has not ended is cancelled again after so long (seconds).
_CANCEL_AGAIN = 0.2
#: A program that keeps them looks so often whether there are any at all (seconds).
_LOOK = 10.0
_REFUSALS: dict[str, type[Exception]] = {
    one.__name__: one for one in (ScheduleNotFound, ConfigurationError, QueueNotFound)
}
_pack = msgspec.json.Encoder().encode
_unpack = msgspec.json.Decoder(ScheduleRow).decode
_request_of = msgspec.msgpack.Decoder(ScheduleRequest).decode


class _Answer(msgspec.Struct, frozen=True):
    """What became of a request: its change without the rows, or who refused it and why."""

    change: Change = Change()
    refusal: str = ""
    problem: str = ""


_answer_of = msgspec.msgpack.Decoder(_Answer).decode


class _Held:
    """The rows while this program holds the table. A row is changed by one at a time."""

    def __init__(
        self,
        tenure: Tenure,
        statuses: StatusLog,
        store: Callable[[Message], Awaitable[None]],
        to_message: ToMessage,
    ) -> None:
        self._tenure = tenure
        self._statuses = statuses
        self._store = store
        self._to_message = to_message
        self._rows = {row.name: row for row in rows_of(tenure.rows)}
        #: When each may be due, the first first; entries that a change has overtaken stay until they come up.
        self._heap = [(due, name) for name, row in self._rows.items() if (due := row.due) is not None]
        heapq.heapify(self._heap)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def is_over(self) -> bool:
        return self._tenure.is_over

    @property
    def rows(self) -> Mapping[str, ScheduleRow]:
        return self._rows

    def due(self, now: float) -> tuple[Sequence[ScheduleRow], float | None]:
        """Those that are due, and in how many seconds the next one is."""
        found: dict[str, ScheduleRow] = {}
        resting: list[tuple[float, str]] = []
        while self._heap and self._heap[0][0] <= now:
            due, name = heapq.heappop(self._heap)
            row = self._rows.get(name)
            if row is None or row.due != due:
                continue
            resting.append((due, name))
            if not row.rests(now):
                found[name] = row
        following = self._heap[0][0] - now if self._heap else None
        # Until it has moved on, it is due.
        for entry in resting:
            heapq.heappush(self._heap, entry)
        return list(found.values()), following

    async def advance(self, name: str, unfinished: Mapping[str, bool]) -> Change:
        async with self._alone([name]):
            row = self._rows.get(name)
            if row is None:
                return Change()
            change = advance(row, time.time(), unfinished)
            if change.tasks:
                await self._enqueue(row, change)
            else:
                await self._set(change.rows)
            return change

    async def do(self, request: ScheduleRequest) -> Change:
        """Raises what refuses it."""
        match request:
            case Declare(origin, _, schedules):
                mine = [row.name for row in self._rows.values() if row.schedule.origin == origin]
                names = {*mine, *(one.name for one in schedules)}
            case Put(schedule):
                names = {schedule.name}
            case _:
                names = {request.name}
        async with self._alone(names):
            change = asked(request, self._rows, time.time())
            if change is None:
                raise no_schedule(request)
            if change.tasks:
                (row,) = [self._rows[name] for name in change.rows]
                await self._enqueue(row, change)
            else:
                await self._set(change.rows)
            return change

    async def _enqueue(self, row: ScheduleRow, change: Change) -> None:
        """Store the tasks one after the other, each with the row as it is then."""
        for step, task in steps(row, change):
            message, value = self._to_message(task), _pack(step)
            if len(value) <= MOST_RIDING:
                await self._tenure.enqueue(message, row.name, value)
            else:
                # Its end in between has the task stored again, with the same id.
                await self._store(message)
                await self._tenure.change({row.name: value})
            self._note({row.name: step})
            await self._tell(task)

    async def _tell(self, task: Envelope) -> None:
        """Of a task that nobody is told of, nobody would know that it is not finished."""
        try:
            await self._statuses.record(told_of([task], time.time()))
        except LeveretError as error:
            log.warning("task %s is stored, and those who watch are not told: %s", task.id, error)

    async def _set(self, rows: Mapping[str, ScheduleRow | None]) -> None:
        fresh = sum(row is not None and name not in self._rows for name, row in rows.items())
        if fresh and len(self._rows) + fresh > MOST_ROWS:
            raise ConfigurationError(
                f"there are {len(self._rows)} schedules, and RabbitMQ keeps {MOST_ROWS} at most: one may "
                "enqueue many tasks, with enqueue_many"
            )
        if rows:
            await self._tenure.change({name: None if row is None else _pack(row) for name, row in rows.items()})
            self._note(rows)

    def _note(self, rows: Mapping[str, ScheduleRow | None]) -> None:
        for name, row in rows.items():
            if row is None:
                self._rows.pop(name, None)
                continue
            self._rows[name] = row
            if (due := row.due) is not None:
                heapq.heappush(self._heap, (due, name))

    @asynccontextmanager
    async def _alone(self, names: Iterable[str]) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for name in sorted(names):
                await stack.enter_async_context(self._locks.setdefault(name, asyncio.Lock()))
            yield


class RabbitMQSchedules:
    """See `leveret.brokers.Schedules`. ``store``: stores a message durably."""

    def __init__(
        self,
        table: FencedTable,
        statuses: StatusLog,
        to_message: ToMessage,
        store: Callable[[Message], Awaitable[None]],
    ) -> None:
        self._table = table
        self._statuses = statuses
        self._to_message = to_message
        self._store = store
        self._keepers: set[_Keeper] = set()

    async def read(self) -> Sequence[ScheduleRow]:
        return sorted(rows_of(await self._table.read()), key=lambda row: row.name)

    async def ask(self, request: ScheduleRequest) -> Change:
        encoded = msgspec.msgpack.encode(request)
        for _ in range(_TRIES):
            answer = await self._table.ask(encoded, _ANSWER)
            if answer is not None:
                return _result(_answer_of(answer))
            if not await self._is_needed(request):
                if isinstance(request, Declare):
                    return Change()
                raise no_schedule(request)
            change = await self._do_here(request)
            if change is not None:
                # The table may be there from now on.
                for keeper in self._keepers:
                    keeper.look()
                return change
        raise BrokerUnavailable(
            f"whoever keeps the schedules did not answer {_TRIES} times; what was asked may be done or not"
        )

    async def _do_here(self, request: ScheduleRequest) -> Change | None:
        """Where nobody keeps them, this program does for a moment; None: somebody does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER), self._table.tenures() as tenures:
                async for tenure in tenures:
                    with suppress(TenureLost):
                        return await (await self.hold(tenure)).do(request)
        return None

    async def _is_needed(self, request: ScheduleRequest) -> bool:
        """Whether the table is to be used, and so be made if it is not there."""
        adds = isinstance(request, Put) or (isinstance(request, Declare) and bool(request.schedules))
        return adds or await self._table.exists()

    @asynccontextmanager
    async def keep(self) -> AsyncGenerator[ScheduleKeeper]:
        keeper = _Keeper(self, self._table)
        self._keepers.add(keeper)
        try:
            yield keeper
        finally:
            self._keepers.discard(keeper)
            await keeper.close()

    async def hold(self, tenure: Tenure) -> _Held:
        """What this one holds now. A task that may be missing is stored again, with the same id."""
        held = _Held(tenure, self._statuses, self._store, self._to_message)
        doubtful = [held.rows[name] for name in tenure.uncertain if name in held.rows and held.rows[name].recent]
        ids = [row.recent[-1] for row in doubtful]
        known = {status.id for status in await self._statuses.read(ids)} if ids else ()
        for row in doubtful:
            if row.recent[-1] not in known and (task := row.last_task()) is not None:
                log.warning("schedule %r: task %s may not be stored, and is stored again", row.name, task.id)
                await self._store(self._to_message(task))
        return held


class _Keeper:
    """See `leveret.brokers.ScheduleKeeper`: it waits until this program holds the table."""

    def __init__(self, schedules: RabbitMQSchedules, table: FencedTable) -> None:
        self._schedules = schedules
        self._table = table
        self._held: _Held | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def due(self) -> tuple[Sequence[ScheduleRow], float | None]:
        if self._task is None:
            if not await self._table.exists():
                return (), None
            self._task = asyncio.get_running_loop().create_task(self._hold())
        if self._task.done():
            self._task.result()  # raises why it has ended
        held = self._held
        return ((), None) if held is None or held.is_over else held.due(time.time())

    async def advance(self, name: str, unfinished: Mapping[str, bool]) -> Change:
        if self._held is None:
            raise TenureLost("this program does not keep the schedules any more")
        return await self._held.advance(name, unfinished)

    def look(self) -> None:
        self._changed.set()

    async def wait(self, seconds: float) -> None:
        seconds = seconds if self._task is not None else min(seconds, _LOOK)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    async def close(self) -> None:
        while self._task is not None and not self._task.done():
            self._task.cancel()  # more than once, since aiormq may swallow it
            await asyncio.wait([self._task], timeout=_CANCEL_AGAIN)

    async def _hold(self) -> None:
        """Stand by, and answer requests while this one holds the table."""
        async with self._table.tenures() as tenures:
            async for tenure in tenures:
                try:
                    self._held = held = await self._schedules.hold(tenure)
                    self._changed.set()
                    async with asyncio.TaskGroup() as answering:
                        async for request in tenure:
                            answering.create_task(self._answer(held, request))
                except* TenureLost as lost:
                    log.debug("the schedules are kept by another one: %s", lost.exceptions[0])
                self._held = None
                self._changed.set()

    async def _answer(self, held: _Held, request: Request) -> None:
        """It stays in its queue, for the next one, when this one is not the keeper any more."""
        try:
            change = await held.do(_request_of(request.body))
            answer = _Answer(msgspec.structs.replace(change, rows={}))
        except TenureLost:
            return
        except (msgspec.MsgspecError, LeveretError) as error:
            answer = _Answer(refusal=type(error).__name__, problem=str(error))
        request.answer(msgspec.msgpack.encode(answer))
        request.done()
        self._changed.set()


def rows_of(table: Mapping[str, bytes]) -> list[ScheduleRow]:
    """Those that this release can read."""
    found = [decoded(_unpack, value) for value in table.values()]
    return [row for row in found if row is not None]


def _result(answer: _Answer) -> Change:
    if not answer.refusal:
        return answer.change
    raise _REFUSALS.get(answer.refusal, BrokerUnavailable)(answer.problem)
