"""Unique keys on RabbitMQ: a log of claims, in which the first live claim of a key wins.

A stream is a total order that every reader agrees on, without anybody who leads. Who wants a key appends a claim, and
reads on to it: what the entries before it add up to (`Holders`) decides. A claim carries its task, so that another
program stores it if the claimer has died before it did. The end of a task is an entry too.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Final

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.coordination.claim_entries import (
    Adopted,
    AnotherKey,
    Emptied,
    Entry,
    History,
    Holders,
    NewClaim,
    Pending,
    Row,
    Snapshot,
    Terms,
    Turn,
    encode,
    entry_of,
)
from leveret.brokers.rabbitmq.queues import Declaration, message_count
from leveret.brokers.rabbitmq.statuses import Reading, StatusStream, last_offset
from leveret.errors import BrokerError, BrokerUnavailable, EnqueueError, EnqueueTimeout, LeveretError, QueueNotFound
from leveret.model import (
    KeyHolder,
    id_for,
    id_key,
    id_token,
    is_replaceable,
    latest_due,
    replaced,
    this_process,
    unique_for,
    unique_key,
    waiting_key,
)
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from leveret.brokers.base import OnConflict
    from leveret.brokers.rabbitmq.amqp import Hosts
    from leveret.brokers.rabbitmq.queues import Publisher
    from leveret.brokers.rabbitmq.statuses import Place
    from leveret.model import Envelope

log = logging.getLogger("leveret.rabbitmq")

STREAM = "leveret.claims"
#: A key is free so long after its task was enqueued, or was due, whatever was lost (seconds).
HOLD = 86_400.0
#: How long the entries are kept, and in pieces of which size.
_KEPT = "7D"
_SEGMENT = 16 * 1024 * 1024
#: How long nothing may come of what is stored until the reader counts as deaf (seconds), and how often that is seen.
_DEAF = 2.0
_LOOK = 0.25
#: Claims in one entry, about so many bytes of them, and how many entries are on their way at once.
_MOST_IN_ONE = 500
_MOST_BYTES = 256 * 1024
_AT_ONCE = 4
#: That a task is stored is told so late, with other entries if there are any by then (seconds).
_GATHER = 0.05
#: How long an end may take to be told before its task's outcome is recorded without it (seconds).
_PATIENCE = 2.0
#: For so long a claim may wait for its task; then another program stores it (seconds).
ORPHANED = 20.0
#: How often it is looked for those (seconds).
_LOOK_AFTER = 10.0
#: So much of the log is read by who begins to use it, before somebody writes a snapshot (entries, about); how large its
#: parts are (rows); and in how many of the last entries it is looked for.
_LONG = 10_000
_ROWS = 1_000
_LAST = 200
#: A claim that is void by so much is in no snapshot (seconds): clocks may differ.
_VOID = 3_600.0
#: What waits until the log takes something again; then the oldest are dropped, and those keys are free a day later.
_MOST_OWED = 100_000
_DOING = "reading who has which unique key"


def claims_declaration() -> Declaration:
    return Declaration(
        STREAM,
        arguments={
            "x-queue-type": "stream",
            "x-max-age": _KEPT,
            "x-stream-max-segment-size-bytes": _SEGMENT,
        },
    )


class _Itself(Enum):
    """The task that asks."""

    ITSELF = "itself"


_ITSELF: Final = _Itself.ITSELF


class _Ask:
    """Who has the keys of a task, asked by that task. The answer: itself, or the id of another one that has one of
    them; None: nobody has, and they were not claimed.

    ``replaces``: it gives its arguments to the task that has its unique key.
    """

    def __init__(self, envelope: Envelope, *, replaces: bool = False) -> None:
        self.envelope = envelope
        self.keys = claimed_keys(envelope)
        self.replaces = replaces and is_replaceable(envelope.headers)
        self.answer: asyncio.Future[str | _Itself | None] = asyncio.get_running_loop().create_future()

    def decide(self, holders: Holders) -> None:
        mark, held = mark_of(self.envelope), [holders.get(key) for key in self.keys]
        others = [one.id for one in held if one is not None and one.mark != mark]
        if not self.answer.done():
            self.answer.set_result(others[0] if others else None if None in held else _ITSELF)


class _Round:
    """An entry that is read back, and what was asked with it."""

    def __init__(self, asks: Sequence[_Ask] = ()) -> None:
        self.asks = asks
        self.came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def decide(self, holders: Holders, at: float) -> None:
        """``at``: when its entry was written (Unix time)."""
        del at
        for ask in self.asks:
            ask.decide(holders)
        if not self.came.done():
            self.came.set_result(None)


class _Begin(_Round):
    """Tasks that are about to begin, by their keys and ids, and what is to become of each."""

    def __init__(self, tasks: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.tasks = tasks
        self.turns: Sequence[Turn] = ()

    def decide(self, holders: Holders, at: float) -> None:
        self.turns = [holders.turn(key, id_, at) for key, id_ in self.tasks]
        super().decide(holders, at)


class Claims:
    """One program's way to the log and from it. Nothing is read before the first task with a unique key.

    ``knows``: whether a task of that queue may be stored here. ``store``: stores tasks.
    """

    def __init__(
        self,
        hosts: Hosts,
        publisher: Publisher,
        *,
        timeout: float,
        knows: Callable[[str], bool],
        store: Callable[[Sequence[Envelope]], Awaitable[None]],
    ) -> None:
        self._publisher = publisher
        self._stream = StatusStream(hosts, publisher, declaration=claims_declaration(), timeout=timeout)
        self._timeout = timeout
        self._knows = knows
        self._store = store
        self._me = f"{this_process()}:{secrets.token_hex(6)}"
        self._reader = _Reader(self._stream, self._begin_reading, self._read)
        self._history = History(self._decide)
        self._rounds: dict[int, _Round] = {}
        self._number = 0
        self._asks: list[_Ask] = []
        #: One `_ask` has begun that will take all of them.
        self._is_asking = False
        #: The ids of tasks that this program is storing.
        self._storing: set[str] = set()
        self._debts = _Debts(self._append)
        self._rooms = asyncio.Semaphore(_AT_ONCE)
        self._running: set[asyncio.Task[None]] = set()
        self._looking_after: asyncio.Task[None] | None = None
        self._warnings = LimitedLog(log)

    # What a producer does.

    async def publish(self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict) -> Mapping[str, str]:
        """Store tasks, those with keys only where no other has them. See `leveret.brokers.Broker.publish`.

        "raise": all are stored, or none: then what is given are the tasks that are in the way.
        """
        keyed = [one for one in envelopes if claimed_keys(one)]
        existing = await self.claim(keyed, replaces=on_conflict == "replace")
        if existing and on_conflict == "raise":
            await self.ended([pair for one in keyed if one.id not in existing for pair in _pairs(one)])
            return existing
        admitted = [one for one in envelopes if one.id not in existing]
        if admitted:
            await self.storing(admitted, self._store)
        return existing

    async def claim(
        self, envelopes: Sequence[Envelope], *, replaces: bool = False, are_dead: bool = False
    ) -> Mapping[str, str]:
        """Claim the keys of tasks; the ids of those that did not get theirs, each with that of the one that has it.

        ``replaces``: that one gets its arguments, if both have the same unique key. ``are_dead``: they are dead
        letters, which have their own ids still. Raises BrokerError.
        """
        asks = [_Ask(one, replaces=replaces) for one in envelopes if claimed_keys(one)]
        self._storing.update(mark_of(ask.envelope) for ask in asks)
        existing: dict[str, str] = {}
        try:
            wanted = asks
            while wanted:
                self._asks += wanted
                self._begin_asking()
                answers = [await ask.answer for ask in wanted]
                found = dict(zip((ask.envelope.id for ask in wanted), answers, strict=True))
                existing |= {id_: holder for id_, holder in found.items() if isinstance(holder, str)}
                # Their holders' ends were read after the question was asked.
                wanted = [_Ask(ask.envelope, replaces=replaces) for ask in wanted if found[ask.envelope.id] is None]
        except BaseException:
            self._storing.difference_update(mark_of(ask.envelope) for ask in asks)
            for ask in asks:
                ask.answer.cancel()  # what was not asked yet is not asked any more
            lost = [ask.envelope for ask in asks if ask.envelope.id not in existing]
            self._owe_refused(lost, are_dead=are_dead)
            raise
        self._storing.difference_update(mark_of(ask.envelope) for ask in asks if ask.envelope.id in existing)
        return existing

    async def storing(
        self,
        envelopes: Sequence[Envelope],
        store: Callable[[Sequence[Envelope]], Awaitable[None]],
        *,
        are_dead: bool = False,
    ) -> None:
        """Store tasks whose keys are claimed, and tell the others what came of it. ``are_dead``: see `claim`."""
        try:
            await store(envelopes)
        except (EnqueueTimeout, asyncio.CancelledError):
            raise  # it may be stored: whoever finds the claim without a word more makes it so
        except LeveretError as error:
            refused = set(getattr(error, "ids", ())) or {one.id for one in envelopes}
            self._owe_refused([one for one in envelopes if one.id in refused], are_dead=are_dead)
            self._debts.owe(stored=[pair for one in envelopes if one.id not in refused for pair in _pairs(one)])
            raise
        else:
            self._debts.owe(stored=[pair for one in envelopes for pair in _pairs(one)])
        finally:
            self._storing.difference_update(map(mark_of, envelopes))

    def _owe_refused(self, envelopes: Sequence[Envelope], *, are_dead: bool) -> None:
        """They are not stored."""
        freed = [pair for one in envelopes for pair in _pairs(one)]
        if are_dead:
            ended = [(id_key(one.id), token, True) for one in envelopes if (token := id_token(one.headers))]
            kept = {key for key, _, _ in ended}
            self._debts.owe(freed=[pair for pair in freed if pair[0] not in kept], ended=ended)
        else:
            self._debts.owe(freed=freed)

    def _begin_asking(self) -> None:
        if self._looking_after is None:
            self.look_after()
        if self._is_asking:
            return
        self._is_asking = True
        task = asyncio.get_running_loop().create_task(self._ask())
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _ask(self) -> None:
        """Ask for all that wait now, in one entry: as many as fit."""
        async with self._rooms:
            asks = self._next_asks()
            if not asks:
                return
            entry = Entry(claims=[_claim(ask, time.time()) for ask in asks if ask.replaces or self._are_free(ask)])
            try:
                await self._decided(entry, _Round(asks))
            except BaseException as error:
                for ask in asks:
                    if not ask.answer.done():
                        ask.answer.set_exception(_failure(error, asks))
                        ask.answer.exception()  # nobody may be waiting for it any more
                if not isinstance(error, Exception):
                    raise

    def _next_asks(self) -> list[_Ask]:
        self._is_asking = False
        asks: list[_Ask] = []
        size = 0
        while self._asks and len(asks) < _MOST_IN_ONE and size < _MOST_BYTES:
            ask = self._asks.pop(0)
            if not ask.answer.done():
                asks.append(ask)
                size += len(ask.envelope.body)
        if self._asks:
            self._begin_asking()
        return asks

    def _are_free(self, ask: _Ask) -> bool:
        mark, now = mark_of(ask.envelope), time.time()
        held = [self._history.holders.get(key) for key in ask.keys]
        return all(one is None or one.until <= now or one.mark == mark for one in held)

    # What a worker does.

    async def begin(self, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
        """Ask before tasks run whose arguments later calls may have replaced: each as it is to run now.

        One that is put off has a later ``due``, and is to be asked for again then. Raises BrokerError or TimeoutError.
        """
        found: list[Envelope] = []
        for start in range(0, len(envelopes), _MOST_IN_ONE):
            some = envelopes[start : start + _MOST_IN_ONE]
            tasks = [(unique_key(one.headers) or "", mark_of(one)) for one in some]
            round_ = _Begin(tasks)
            await self._decided(Entry(taken=tasks), round_)
            found += [_begun(one, turn) for one, turn in zip(some, round_.turns, strict=True)]
        return found

    async def free(self, keys: Sequence[tuple[str, str]]) -> None:
        """See `leveret.brokers.UniqueKeys`. The key of a task that was replaced is free since it was taken."""
        holders = self._history.holders
        await self.ended([(key, id_) for key, id_ in keys if not holders.is_over(id_)])

    async def ended(self, keys: Sequence[tuple[str, str]], own: Sequence[tuple[str, str, bool]] = ()) -> None:
        """The tasks with these keys, and ids or tokens, have ended. Told when it returns; later if nothing can be.

        ``own``: ids that producers chose, see `Entry.ended`.
        """
        if not keys and not own:
            return
        self.look_after()
        if self._debts.is_behind:
            self._debts.owe(freed=keys, ended=own)
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._append(Entry(freed=list(keys), ended=list(own)))
        except (LeveretError, TimeoutError) as error:
            self._warnings.warning(
                "that %d unique keys are free cannot be told now; it is tried again: %s",
                len(keys) + len(own),
                str(error) or "no answer",
            )
            self._debts.owe(freed=keys, ended=own)

    def look_after(self) -> None:
        """From now on, store the tasks of claims whose programs have died."""
        if self._looking_after is None:
            self._looking_after = asyncio.get_running_loop().create_task(self._look_after())

    async def _look_after(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(_LOOK_AFTER * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                await self._reader.begin()
                for key, pending in self._history.holders.overdue(clock() - ORPHANED):
                    if pending.claim.mark not in self._storing and self._knows(pending.claim.queue):
                        await self._complete(key, pending)
                if self._history.is_complete and self._history.weight > max(_LONG, 2 * len(self._history.holders)):
                    await self._sum_up()
            except (LeveretError, TimeoutError, *amqp.CONNECTION_LOST) as error:
                log.debug("it could not be looked whether claims lack their tasks: %s", error)
            except asyncio.CancelledError:
                if amqp.is_cancelled():
                    raise

    async def _complete(self, key: str, pending: Pending) -> None:
        claim, envelope = pending.claim, pending.envelope()
        if envelope is None:
            await self._append(Entry(freed=[(key, claim.mark)]))
            return
        await self._decided(Entry(adopted=[Adopted(key, claim.id, claim.owner)]), _Round())
        if self._history.holders.pending(key) is not pending or claim.owner != self._me:
            return  # another was first
        log.warning("the program that claimed %r died before it had stored task %s: storing it", key, claim.id)
        try:
            await self.storing([envelope], self._store)
        except QueueNotFound:
            log.warning("task %s cannot be stored, since its queue is gone; its unique key is free", claim.id)

    async def _sum_up(self) -> None:
        """Write a snapshot: programs that begin to read later need nothing older."""
        upto, token = self._reader.offset, secrets.token_hex(6)
        parts = _parts(list(self._history.holders.rows(time.time() - _VOID)))
        for number, part in enumerate(parts):
            if self._history.base > upto:
                return  # another was first
            await self._append(Entry(snapshot=Snapshot(upto, token, number, len(parts), part)))

    # What an operator does.

    async def cancelled(self, id_: str) -> None:
        """A task that waited was cancelled."""
        await self._tell(Entry(cancelled=[id_]))

    async def emptied(self, queue: str, running: Collection[str], *, with_dead: bool) -> None:
        """What waited in a queue was deleted; its dead letters too, or not."""
        await self._tell(Entry(emptied=[Emptied(queue, list(running), with_dead)]))

    async def dropped(self, envelopes: Sequence[Envelope]) -> None:
        """Dead letters were deleted."""
        if ended := [(id_key(one.id), token, False) for one in envelopes if (token := id_token(one.headers))]:
            await self._tell(Entry(ended=ended))

    async def holders(self, limit: int) -> Sequence[KeyHolder]:
        """See `leveret.brokers.UniqueKeys`."""
        if not await self.exists():
            return ()
        await self._read_to_the_end()
        now = time.time()
        taken = sorted((key, one.id, one.queue) for key, one in self._history.holders.items() if one.until > now)
        return [KeyHolder(*one) for one in taken[:limit]]

    async def release(self, key: str) -> str | None:
        """See `leveret.brokers.UniqueKeys`."""
        if not await self.exists():
            return None
        await self._read_to_the_end()
        held = self._history.holders.get(key)
        if held is None or held.until <= time.time():
            return None
        await self._append(Entry(freed=[(key, held.mark)]))
        return held.id

    async def _read_to_the_end(self) -> None:
        try:
            await self._decided(Entry(), _Round())
        except TimeoutError as error:
            raise BrokerUnavailable(f"{_DOING}: no answer within {self._timeout:g} s") from error

    async def _tell(self, entry: Entry) -> None:
        """Tell what has happened already; nobody shall hear that it has not."""
        try:
            if await self.exists():
                await self._append(entry)
        except LeveretError as error:
            log.warning("unique keys may stay taken for up to %g hours: %s", HOLD / 3600, error)

    async def exists(self) -> bool:
        """Whether anybody has ever claimed a key, as far as this user may see. Raises BrokerError."""
        if self._reader.has_begun:
            return True
        try:
            return await amqp.told(message_count(await self._publisher.connection(), STREAM)) is not None
        except amqp.ChannelAccessRefused:
            return False
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, _DOING) from error

    async def close(self) -> None:
        if self._looking_after is not None:
            self._running.add(self._looking_after)
        await self._debts.close(_PATIENCE)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._reader.close()
        await self._stream.close()
        self._warnings.flush()

    # Writing and reading.

    async def _append(self, entry: Entry) -> None:
        await self._stream.store(encode(self._signed(entry)))

    def _signed(self, entry: Entry) -> Entry:
        self._number += 1
        base = self._history.base if self._history.is_complete else 0
        return msgspec.structs.replace(entry, by=self._me, n=self._number, at=time.time(), base=base)

    async def _decided(self, entry: Entry, round_: _Round) -> None:
        """Append an entry, and read on to it. Raises BrokerError or TimeoutError."""
        entry = self._signed(entry)
        signed = self._debts.pay(entry)
        self._rounds[signed.n] = round_
        was_sent = False
        try:
            async with asyncio.timeout(self._timeout):
                await self._reader.begin()
                losses, was_sent = self._reader.losses, True
                await self._stream.store(encode(signed))
                while not round_.came.done():
                    await self._reader.hear(round_.came)
                    if self._reader.losses != losses:
                        losses = self._reader.losses
                        await self._stream.store(encode(signed))
        except BaseException as error:
            # What went with it, and may not have come.
            self._debts.owe(
                freed=signed.freed[: len(signed.freed) - len(entry.freed)],
                stored=signed.stored[: len(signed.stored) - len(entry.stored)],
                ended=signed.ended[: len(signed.ended) - len(entry.ended)],
            )
            if isinstance(error, TimeoutError) and not was_sent:
                why = f"{_DOING}: not possible within {self._timeout:g} s; {self._publisher.why_silent()}"
                raise BrokerUnavailable(why) from error
            raise
        finally:
            del self._rounds[signed.n]

    def _begin_reading(self, base: int) -> None:
        self._history.begin(base)

    def _read(self, offset: int, body: bytes) -> None:
        entry = entry_of(body)
        if entry is not None:
            self._history.read(offset, entry, asyncio.get_running_loop().time(), len(body))

    def _decide(self, entry: Entry) -> None:
        if entry.by == self._me and (round_ := self._rounds.get(entry.n)) is not None:
            round_.decide(self._history.holders, entry.at)


class _Reader:
    """Reads the log from its last snapshot on.

    ``anew``: called with where it begins; 0: with the first entry. ``take``: called with each entry.
    """

    def __init__(self, stream: StatusStream, anew: Callable[[int], None], take: Callable[[int, bytes], None]) -> None:
        self._stream = stream
        self._anew = anew
        self._take = take
        #: A snapshot was looked for in vain.
        self._from_first = False
        self._reading: Reading | None = None
        self._line: amqp.Link | None = None
        self._offset: int | None = None
        self._beginning = asyncio.Lock()
        #: How often in a row it was deaf.
        self._deaf = 0
        #: How often the log was lost: what was written before is not in this one.
        self.losses = 0

    @property
    def has_begun(self) -> bool:
        return self._reading is not None

    @property
    def offset(self) -> int:
        """Of what was read last."""
        return self._offset or 0

    async def begin(self) -> None:
        """Have it read. Raises BrokerError."""
        if self._is_reading():
            return
        async with self._beginning:
            for pause in backoff():
                if self._is_reading():
                    return
                try:
                    await self._begin()
                except BrokerUnavailable as error:
                    # Within half a second of a leader's loss the next one may refuse readers.
                    log.debug("the claims log cannot be read now: %s", error)
                    await asyncio.sleep(pause)

    def _is_reading(self) -> bool:
        return (
            self._reading is not None
            and not self._reading.is_over
            and self._line is not None
            and not self._line.is_lost
        )

    async def _begin(self) -> None:
        if self._reading is not None and self._reading.was_cancelled:
            self._forget()
            self.losses += 1
        line = await self._stream.open()

        def take(offset: int, body: bytes) -> None:
            if self._reading is reading:
                self._offset = offset
                self._take(offset, body)

        place: Place
        if self._offset is not None:
            place = self._offset + 1
        else:
            base = 0 if self._from_first else await self._base(line)
            self._anew(base)
            place = base or "first"
        reading = Reading(line, STREAM, take)
        self._line, self._reading = line, reading
        await self._stream.run(line, reading.begin(place), _DOING)

    async def _base(self, line: amqp.Link) -> int:
        """Where the last entries say that one can begin; 0: with the first entry."""
        # What is empty has no last entry, and says so by silence alone: seconds, at a program's first enqueue.
        await self._stream.store(encode(Entry()))
        end = await self._stream.run(line, last_offset(line.connection, STREAM), _DOING)
        if not end:
            return 0
        bases = [0]
        came: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(offset: int, body: bytes) -> None:
            entry = entry_of(body)
            if entry is not None:
                bases.append(entry.base)
            if offset >= end and not came.done():
                came.set_result(None)

        reading = Reading(line, STREAM, take)
        try:
            await self._stream.run(line, reading.begin(max(0, end - _LAST)), _DOING)
            await asyncio.wait([came], timeout=_DEAF)
        finally:
            if not line.is_lost:
                with suppress(*amqp.CONNECTION_LOST):
                    await reading.end()
        return max(base for base in bases if base <= end)

    def _forget(self) -> None:
        self._offset = None
        self._anew(0)

    async def hear(self, came: asyncio.Future[None]) -> None:
        """Wait until an entry that is stored has come; returns as well when the reading had to begin anew."""
        await self.begin()
        reading, line = self._reading, self._line
        assert reading is not None
        assert line is not None
        clock = asyncio.get_running_loop().time
        began = clock()
        while not came.done() and not reading.is_over and not line.is_lost:
            if min(clock() - began, reading.quiet_for) > _DEAF:
                break
            await asyncio.wait([came], timeout=_LOOK)
        if came.done():
            self._deaf = 0
            return
        if self._reading is not reading:
            return  # another has found it out
        self._deaf += 1
        if self._deaf > 1:
            self._from_first = True
            self._forget()
        with suppress(*amqp.CONNECTION_LOST):
            await self._stream.give_up(line)

    async def close(self) -> None:
        if self._reading is not None and self._line is not None and not self._line.is_lost:
            with suppress(*amqp.CONNECTION_LOST):
                await self._reading.end()


class _Debts:
    """What the log is told in a moment, or, while it takes nothing, again and again."""

    def __init__(self, append: Callable[[Entry], Awaitable[None]]) -> None:
        self._append = append
        self._freed: list[tuple[str, str]] = []
        self._stored: list[tuple[str, str]] = []
        self._ended: list[tuple[str, str, bool]] = []
        self._paying: asyncio.Task[None] | None = None
        #: The last try failed.
        self.is_behind = False

    def owe(
        self,
        *,
        freed: Sequence[tuple[str, str]] = (),
        stored: Sequence[tuple[str, str]] = (),
        ended: Sequence[tuple[str, str, bool]] = (),
    ) -> None:
        self._freed += freed
        self._stored += stored
        self._ended += ended
        if self.is_behind:
            del self._freed[:-_MOST_OWED], self._stored[:-_MOST_OWED], self._ended[:-_MOST_OWED]
        if self._is_owing and (self._paying is None or self._paying.done()):
            self._paying = asyncio.get_running_loop().create_task(self._pay())

    @property
    def _is_owing(self) -> bool:
        return bool(self._freed or self._stored or self._ended)

    def pay(self, entry: Entry) -> Entry:
        """The entry with what is owed."""
        if not self._is_owing or self.is_behind:
            return entry
        owed = self._take()
        return msgspec.structs.replace(
            entry,
            freed=[*owed.freed, *entry.freed],
            stored=[*owed.stored, *entry.stored],
            ended=[*owed.ended, *entry.ended],
        )

    def _take(self) -> Entry:
        freed, self._freed = self._freed[:_MOST_IN_ONE], self._freed[_MOST_IN_ONE:]
        stored, self._stored = self._stored[:_MOST_IN_ONE], self._stored[_MOST_IN_ONE:]
        ended, self._ended = self._ended[:_MOST_IN_ONE], self._ended[_MOST_IN_ONE:]
        return Entry(freed=freed, stored=stored, ended=ended)

    def _take_back(self, owed: Entry) -> None:
        self._freed[:0], self._stored[:0], self._ended[:0] = owed.freed, owed.stored, owed.ended

    async def _pay(self) -> None:
        await asyncio.sleep(_GATHER)
        for pause in backoff():
            while self._is_owing:
                owed = self._take()
                try:
                    await self._append(owed)
                except BrokerError as error:
                    log.debug("the claims log takes nothing now: %s", error)
                    self._take_back(owed)
                    self.is_behind = True
                    break
                except BaseException:
                    self._take_back(owed)
                    raise
                self.is_behind = False
            else:
                return
            await asyncio.sleep(pause)

    async def close(self, patience: float) -> None:
        if self._paying is not None:
            await asyncio.wait([self._paying], timeout=patience)
            self._paying.cancel()
            await asyncio.gather(self._paying, return_exceptions=True)


def claimed_keys(envelope: Envelope) -> list[str]:
    """What a task claims: its unique key, and its id if its producer chose that."""
    if not envelope.headers:
        return []
    key = unique_key(envelope.headers)
    own = None if id_token(envelope.headers) is None else id_key(envelope.id)
    return [one for one in (key, own) if one is not None]


def mark_of(envelope: Envelope) -> str:
    """What tells a task from all others, those with the same id too."""
    return id_token(envelope.headers) or envelope.id


def _pairs(envelope: Envelope) -> list[tuple[str, str]]:
    return [(key, mark_of(envelope)) for key in claimed_keys(envelope)]


def _claim(ask: _Ask, now: float) -> NewClaim:
    one, first = ask.envelope, ask.keys[0]
    task, token = msgspec.Raw(msgspec.json.encode(one)), id_token(one.headers) or ""
    hold, kept = max(now, one.due or 0.0) + HOLD, now + (id_for(one.headers) or 0.0)
    if unique_key(one.headers) is None:
        return NewClaim(first, one.id, one.queue, max(hold, kept), task, token=token, kept_until=kept)
    period = unique_for(one.headers)
    until = hold if period is None else now + period
    terms = None
    if is_replaceable(one.headers):
        terms = Terms(ask.replaces, one.due, latest_due(one.headers), waiting_key(one.headers) is not None)
    more = tuple(AnotherKey(key, max(hold, kept), kept) for key in ask.keys[1:])
    return NewClaim(first, one.id, one.queue, until, task, period is not None, token, more=more, terms=terms)


def _begun(one: Envelope, turn: Turn) -> Envelope:
    if turn.due is not None:
        return msgspec.structs.replace(one, due=turn.due)
    newest = turn.replacement()
    return one if newest is None else msgspec.structs.replace(replaced(one, newest), due=one.due)


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    parts: list[list[Row]] = [[]]
    size = 0
    for row in rows:
        if len(parts[-1]) >= _ROWS or size > _MOST_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += len(bytes(row.claim.task)) + len(bytes(row.newest))
    return parts


def _failure(error: BaseException, asks: Sequence[_Ask]) -> Exception:
    ids = [ask.envelope.id for ask in asks]
    if isinstance(error, TimeoutError) and not isinstance(error, LeveretError):
        return EnqueueTimeout(
            f"RabbitMQ did not say in time whether unique keys are free; {len(ids)} tasks may be stored later", ids
        )
    if isinstance(error, EnqueueTimeout):
        return type(error)(str(error), ids)
    if isinstance(error, BrokerError) and not isinstance(error, EnqueueError):
        return error
    return BrokerUnavailable(f"asking for unique keys was given up: {error!r}")
