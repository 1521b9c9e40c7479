"""Taking from the file: registered with a wake-up, woken when something is dealt, watching over the other consumers."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.inbox import Inbox
from leveret.brokers.sqlite.problems import Trouble, translate
from leveret.brokers.sqlite.wakeup import listening
from leveret.brokers.sqlite.writer import call_soon
from leveret.errors import BrokerError, StoreError
from leveret.model import Delivery, Queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence

    from leveret.brokers.inbox import Arrival
    from leveret.brokers.sqlite.recipients import Claim, Dealt, Receiver
    from leveret.brokers.sqlite.wakeup import Listener, WakeUps
    from leveret.brokers.sqlite.writer import Writer
    from leveret.model import CancelRequest, Describe, WorkerReport

log = logging.getLogger("leveret.sqlite")

#: How often a consumer looks whether another one died, or was not woken because who would have done it died (seconds).
ROUND = 0.5


class Lease:
    """A consumer's right to what it was dealt. It ends with the consumer, never by time."""

    def __init__(self, consumer: int, wake_up: str | None = None) -> None:
        self.consumer = consumer
        self.wake_up = wake_up
        self.held = True
        #: How many deliveries are out under it, and where those are that nobody has read yet.
        self.unsettled = 0
        self.inbox: Inbox | None = None

    @property
    def in_hand(self) -> int:
        """How many were read, and are not settled."""
        return self.unsettled - (0 if self.inbox is None else self.inbox.unread)


class _Registration:
    """A consumer's place in the file: its number, its wake-up, its credit for each of its queues."""

    def __init__(
        self, writer: Writer, wake_ups: WakeUps, queues: Sequence[Queue], credit: int | None, *, describes: bool
    ) -> None:
        self._writer = writer
        self._wake_ups = wake_ups
        self._queues = queues
        self._credit = credit
        self._describes = describes
        self._wake_up: Listener | None = None
        #: Somebody has removed it.
        self.gone = False
        self.lease = Lease(0)
        self.queues = frozenset(queue.name for queue in queues)

    @property
    def is_made(self) -> bool:
        return self._wake_up is not None

    async def make(
        self,
        woken: Callable[[], object],
        receiver: Receiver,
        in_background: Callable[[Coroutine[object, object, None]], None],
    ) -> None:
        """Register; from now on tasks are dealt to this consumer."""
        registered = await sweep(self._writer, self._wake_ups)
        self._wake_ups.clear(registered)
        wake_up = listening(self._wake_ups, woken, self._writer.path)
        try:
            number = await self._writer.do(
                lambda store: store.registrations.register(
                    wake_up.name, self._queues, self._credit, receiver, describes=self._describes
                )
            )
        except asyncio.CancelledError:
            # It may be done all the same, and nobody would ever know its number.
            in_background(self._take_back(wake_up))
            raise
        except BaseException:
            wake_up.remove()
            raise
        self._wake_up, self.lease = wake_up, Lease(number, wake_up.name)

    async def _take_back(self, wake_up: Listener) -> None:
        try:
            with suppress(BrokerError):  # then it is somebody's next round
                await self._writer.do(lambda store: store.registrations.take_back(wake_up.name))
        finally:
            wake_up.remove()

    async def set_credit(self, credit: int) -> None:
        await self._writer.do(lambda store: store.registrations.set_credit(self.lease.consumer, credit))
        self._credit = credit

    async def stop_taking(self) -> None:
        await self._writer.do(lambda store: store.registrations.stop_taking(self.lease.consumer))

    async def look(self) -> None:
        """Ask for what was dealt by others, or has become due."""
        await self._writer.do(lambda store: store.registrations.look(self.lease.consumer))

    async def look_around(self) -> None:
        """Look as ever, and at the others. By what is registered: the pipe of a dead one may be gone too."""
        with suppress(OSError):  # the next round tries again
            if self._wake_up is not None:
                self._wake_up.see_to()
        registered = await self._writer.do(lambda store: store.registrations.look_around(self.lease.consumer))
        with suppress(BrokerError, OSError):
            await bury(self._writer, self._wake_ups, [one for one in registered if one[0] != self.lease.consumer])

    async def leave(self) -> None:
        await self._writer.do(lambda store: store.registrations.leave(self.lease.consumer))

    def remove_wake_up(self) -> None:
        wake_up, self._wake_up = self._wake_up, None
        if wake_up is not None:
            wake_up.remove()


class _Rounds:
    """When to look at the file: when it is woken, when a task is due, and in each round at the latest."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        #: It is time to look.
        self._shall_look = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._next_round = 0.0

    async def wait(self) -> None:
        """Until it is time to look."""
        await self._shall_look.wait()
        self._shall_look.clear()

    def is_next(self) -> bool:
        """Whether the next round begins now. By the clock, not when it is quiet: under steady load it never is."""
        if self._loop.time() < self._next_round:
            return False
        self._next_round = self._loop.time() + ROUND
        return True

    def look_at(self, next_due: float | None) -> None:
        """Look again when the next task is due, at the latest in the next round."""
        if self._shall_look.is_set():
            return
        delay = self._next_round - self._loop.time()
        if next_due is not None:
            delay = min(delay, next_due - time.time())
        when = self._loop.time() + max(0.0, delay)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self.look_soon)

    def look_soon(self) -> None:
        self.stop()
        self._shall_look.set()

    def stop(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()


class SQLiteConsumer:
    """See `leveret.brokers.Consumer`."""

    def __init__(
        self,
        writer: Writer,
        wake_ups: WakeUps,
        queues: Sequence[Queue],
        credit: int | None,
        describe: Describe | None = None,
    ) -> None:
        self._writer = writer
        self._registration = _Registration(writer, wake_ups, queues, credit, describes=describe is not None)
        self._describe = describe
        #: Who asks what it does, and was told.
        self._askers: frozenset[int] = frozenset()
        self._background: set[asyncio.Task[None]] = set()
        self._inbox = Inbox()
        self._stopped = False
        self._closed = False
        self._losses = 0
        self._trouble = Trouble("no tasks can be taken")
        self._loop = asyncio.get_running_loop()
        #: What was dealt before it knew its number.
        self._claims: list[Claim] = []
        self._known_marks: frozenset[CancelRequest] = frozenset()
        self._looking: asyncio.Task[None] | None = None
        self._rounds = _Rounds()

    async def start(self) -> None:
        """Register; from now on tasks are dealt to this consumer."""
        await self._registration.make(self._rounds.look_soon, self._receive, self._in_background)
        self._hand_over()
        self._rounds.look_soon()
        if self._looking is None:
            self._looking = self._loop.create_task(self._keep_looking())

    def __aiter__(self) -> AsyncIterator[Arrival]:
        return self._inbox

    @property
    def hold_limit(self) -> None:
        return None

    @property
    def connected(self) -> bool:
        return not (self._registration.gone or self._trouble.lasts)

    @property
    def losses(self) -> int:
        return self._losses

    @property
    def paused(self) -> frozenset[str]:
        return self._inbox.paused

    async def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            try:
                await self._registration.stop_taking()
            except BrokerError as error:
                log.warning("this consumer may be dealt tasks until it has ended: %s", error)

    @property
    def adjusts_credit(self) -> bool:
        return True

    async def set_credit(self, credit: int) -> None:
        await self._registration.set_credit(credit)

    async def close(self) -> None:
        """Give back what is unsettled."""
        if self._closed:
            return
        self._closed = self._stopped = True
        self._registration.lease.held = False
        self._inbox.close()
        ending = [*self._background, *([] if self._looking is None else [self._looking])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        # Left while it registered again, it takes that back.
        await asyncio.gather(*self._background, return_exceptions=True)
        try:
            await self._registration.leave()
        except StoreError as error:  # if it can be used again, whoever looks finds a wake-up that nobody holds
            log.warning("this consumer ends without its file: %s", error)
        finally:
            self._rounds.stop()
            self._registration.remove_wake_up()

    def _receive(self, dealt: Dealt | None) -> None:
        """In the writer's thread."""
        call_soon(self._loop, partial(self._take, dealt))

    def _take(self, dealt: Dealt | None) -> None:
        registration = self._registration
        if dealt is None:
            self._losses += not registration.gone
            registration.gone = True
            self._rounds.look_soon()
            return
        self._inbox.pause(dealt.paused & registration.queues)
        self._inbox.cancel(mark for mark in dealt.marks if mark not in self._known_marks)
        self._known_marks = frozenset(dealt.marks)
        self._claims += dealt.claims
        if registration.is_made:
            self._hand_over()
        askers, self._askers = dealt.askers - self._askers, dealt.askers
        if askers and self._describe is not None:
            self._in_background(self._answer(sorted(askers), self._describe()))
        self._rounds.look_at(dealt.next_due)

    def _hand_over(self) -> None:
        claims, self._claims = self._claims, []
        lease = self._registration.lease
        lease.unsettled += len(claims)
        lease.inbox = self._inbox
        self._inbox.deliver(
            Delivery(claim.envelope, lease, claim.token, claim.returns, claim.defect) for claim in claims
        )

    async def _keep_looking(self) -> None:
        try:
            while True:
                await self._rounds.wait()
                await self._look()
        except Exception as error:
            self._inbox.fail(error)
            raise

    async def _look(self) -> None:
        if self._registration.gone:
            await self._renew()
            return
        try:
            if self._rounds.is_next():
                await self._registration.look_around()
            else:
                await self._registration.look()
        except BrokerError as error:
            await self._try_again(error)
        else:
            self._trouble.end()

    async def _renew(self) -> None:
        """Somebody removed this living consumer (its pipe was deleted): what it had may run twice. Begin anew."""
        if not self._trouble.lasts:
            log.error(
                "this consumer's registration is gone: the file, or the folder beside it, was deleted or replaced; "
                "registering again"
            )
        self._registration.lease.held = False
        self._rounds.stop()
        self._registration.remove_wake_up()
        if self._stopped:
            return
        try:
            await self._registration.leave()
            self._claims.clear()
            self._inbox.drop_deliveries()
            await self.start()
        except (BrokerError, OSError) as error:
            await self._try_again(translate(error, self._writer.path))
        else:
            self._registration.gone = False

    async def _try_again(self, error: Exception) -> None:
        self._trouble.begin(error)
        await asyncio.sleep(ROUND)
        self._rounds.look_soon()

    async def _answer(self, askers: Sequence[int], report: WorkerReport) -> None:
        answer = msgspec.json.encode(report)
        with suppress(BrokerError):  # then it is left out
            await self._writer.do(
                lambda store: store.questions.answer(self._registration.lease.consumer, askers, answer)
            )

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def sweep(writer: Writer, wake_ups: WakeUps) -> frozenset[str]:
    """Give the tasks of consumers whose processes died to the others; the wake-ups that are registered, by name."""
    registered = await writer.do(lambda store: store.registrations.all())
    await bury(writer, wake_ups, registered)
    await writer.do(lambda store: store.registrations.remove_lost())
    return frozenset(wake_up for _, wake_up in registered if isinstance(wake_up, str))


async def bury(writer: Writer, wake_ups: WakeUps, registered: Iterable[tuple[int, object]]) -> None:
    """Remove those of the consumers, given with their wake-ups, whose processes died."""
    try:
        dead = [(number, wake_up) for number, wake_up in registered if not wake_ups.is_held(wake_up)]
    except OSError as error:
        raise translate(error, writer.path) from error
    if dead:
        await writer.do(lambda store: store.registrations.remove_dead(dead))
        for _, wake_up in dead:
            wake_ups.remove(wake_up)
