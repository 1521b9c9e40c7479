"""Taking from the file: registered with a bell, woken when something is dealt, watching over the other consumers."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.inbox import Inbox
from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.store import Store
from leveret.brokers.sqlite.trouble import Trouble, listening
from leveret.brokers.sqlite.writer import call_soon
from leveret.errors import BrokerError, StoreError
from leveret.model import Delivery, Queue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence

    from leveret.brokers.inbox import Arrival
    from leveret.brokers.sqlite.store import Claim, Dealt
    from leveret.brokers.sqlite.wakeup import Listener, WakeUps
    from leveret.brokers.sqlite.writer import Writer
    from leveret.model import CancelRequest, Describe, WorkerReport

log = logging.getLogger("leveret.sqlite")

#: How often a consumer looks whether another one died, or a ring was lost with its ringer (seconds).
ROUND = 0.5


class Lease:
    """A consumer's right to what it was dealt. It ends with the consumer, never by time."""

    def __init__(self, consumer: int, bell: str | None = None) -> None:
        self.consumer = consumer
        self.bell = bell
        self.held = True
        #: How many deliveries are out under it.
        self.unsettled = 0


class SQLiteConsumer:
    """See `leveret.brokers.Consumer`."""

    def __init__(
        self,
        writer: Writer,
        bells: WakeUps,
        queues: Sequence[Queue],
        credit: int | None,
        describe: Describe | None = None,
    ) -> None:
        self._writer = writer
        self._bells = bells
        self._queues = queues
        self._credit = credit
        self._describe = describe
        #: Who asks what it does, and was told.
        self._askers: frozenset[int] = frozenset()
        self._answering: set[asyncio.Task[None]] = set()
        self._inbox = Inbox()
        self._stopped = False
        self._closed = False
        self._lease = Lease(0)
        self._bell: Listener | None = None
        #: Somebody has removed the registration.
        self._gone = False
        self._losses = 0
        self._trouble = Trouble("no tasks can be taken")
        self._loop = asyncio.get_running_loop()
        #: What was dealt before it knew its number.
        self._claims: list[Claim] = []
        self._known_marks: frozenset[CancelRequest] = frozenset()
        self._looking: asyncio.Task[None] | None = None
        #: It is time to look.
        self._shall_look = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._next_round = 0.0

    async def start(self) -> None:
        """Register; from now on tasks are dealt to this consumer."""
        registered = await sweep(self._writer, self._bells)
        self._bells.clear(registered)
        bell = listening(self._bells, self._look_soon, self._writer)
        try:
            number = await self._writer.do(
                partial(
                    Store.register,
                    bell=bell.name,
                    queues=self._queues,
                    credit=self._credit,
                    receiver=self._receive,
                    describes=self._describe is not None,
                )
            )
        except asyncio.CancelledError:
            # It may be done all the same, and nobody would ever know its number.
            self._in_background(self._take_back(bell))
            raise
        except BaseException:
            bell.take_down()
            raise
        self._bell, self._lease = bell, Lease(number, bell.name)
        self._hand_over()
        self._look_soon()
        if self._looking is None:
            self._looking = self._loop.create_task(self._keep_looking())

    async def _take_back(self, bell: Listener) -> None:
        try:
            with suppress(BrokerError):  # then it is somebody's next round
                await self._writer.do(partial(Store.take_back, bell=bell.name))
        finally:
            bell.take_down()

    def __aiter__(self) -> AsyncIterator[Arrival]:
        return self._inbox

    @property
    def hold_limit(self) -> None:
        return None

    @property
    def connected(self) -> bool:
        return not (self._gone or self._trouble.lasts)

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
                await self._writer.do(partial(Store.stop_taking, consumer=self._lease.consumer))
            except BrokerError as error:
                log.warning("this consumer may be dealt tasks until it has ended: %s", error)

    async def set_credit(self, credit: int) -> None:
        await self._writer.do(partial(Store.set_credit, consumer=self._lease.consumer, credit=credit))
        self._credit = credit

    async def close(self) -> None:
        """Give back what is unsettled."""
        if self._closed:
            return
        self._closed = self._stopped = True
        self._lease.held = False
        self._inbox.close()
        ending = [*self._answering, *([] if self._looking is None else [self._looking])]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        # Left while it registered again, it takes that back.
        await asyncio.gather(*self._answering, return_exceptions=True)
        try:
            await self._writer.do(partial(Store.leave, consumer=self._lease.consumer))
        except StoreError as error:  # if it can be used again, whoever looks finds a bell that nobody holds
            log.warning("this consumer ends without its file: %s", error)
        finally:
            self._let_go_of_bell()

    def _receive(self, dealt: Dealt | None) -> None:
        """In the writer's thread."""
        call_soon(self._loop, partial(self._take, dealt))

    def _take(self, dealt: Dealt | None) -> None:
        if dealt is None:
            self._losses += not self._gone
            self._gone = True
            self._look_soon()
            return
        self._inbox.pause(dealt.paused.intersection(queue.name for queue in self._queues))
        self._inbox.cancel(mark for mark in dealt.marks if mark not in self._known_marks)
        self._known_marks = frozenset(dealt.marks)
        self._claims += dealt.claims
        if self._bell is not None:
            self._hand_over()
        askers, self._askers = dealt.askers - self._askers, dealt.askers
        if askers and self._describe is not None:
            self._in_background(self._answer(sorted(askers), self._describe()))
        if not self._shall_look.is_set():
            self._look_at(dealt.next_due)

    def _hand_over(self) -> None:
        claims, self._claims = self._claims, []
        self._lease.unsettled += len(claims)
        self._inbox.deliver(
            Delivery(claim.envelope, self._lease, claim.token, claim.returns, claim.defect) for claim in claims
        )

    async def _keep_looking(self) -> None:
        try:
            while True:
                await self._shall_look.wait()
                await self._look()
        except Exception as error:
            self._inbox.fail(error)
            raise

    async def _look(self) -> None:
        """Ask for what was dealt by others, or has become due."""
        self._shall_look.clear()
        if self._gone:
            await self._renew()
            return
        try:
            # By the clock, not when it is quiet: under steady load it never is.
            if self._loop.time() >= self._next_round:
                self._next_round = self._loop.time() + ROUND
                await self._look_around()
            else:
                await self._writer.do(partial(Store.look, consumer=self._lease.consumer))
        except BrokerError as error:
            self._trouble.begin(error)
            await asyncio.sleep(ROUND)
            self._look_soon()
        else:
            self._trouble.end()

    def _look_at(self, next_due: float | None) -> None:
        """Look again when the next task is due, at the latest in the next round."""
        delay = self._next_round - self._loop.time()
        if next_due is not None:
            delay = min(delay, next_due - time.time())
        when = self._loop.time() + max(0.0, delay)
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._look_soon)

    def _look_soon(self) -> None:
        self._stop_timer()
        self._shall_look.set()

    async def _look_around(self) -> None:
        """Look as ever, and at the others. By what is registered: of a dead one the bell's file may be gone too."""
        with suppress(OSError):  # the next round tries again
            if self._bell is not None:
                self._bell.see_to()
        registered = await self._writer.do(partial(Store.look_around, consumer=self._lease.consumer))
        with suppress(BrokerError, OSError):
            await bury(self._writer, self._bells, [one for one in registered if one[0] != self._lease.consumer])

    async def _renew(self) -> None:
        """Somebody removed this living consumer (its bell was deleted): what it had may run twice. Begin anew."""
        if not self._trouble.lasts:
            log.error(
                "this consumer's registration is gone: the file, or the folder beside it, was deleted or replaced; "
                "registering again"
            )
        self._lease.held = False
        self._let_go_of_bell()
        if self._stopped:
            return
        try:
            await self._writer.do(partial(Store.leave, consumer=self._lease.consumer))
            self._claims.clear()
            self._inbox.drop_deliveries()
            await self.start()
        except (BrokerError, OSError) as error:
            self._trouble.begin(translate(error, self._writer.path))
            await asyncio.sleep(ROUND)
            self._look_soon()
        else:
            self._gone = False

    async def _answer(self, askers: Sequence[int], report: WorkerReport) -> None:
        answer = msgspec.json.encode(report)
        with suppress(BrokerError):  # then it is left out
            await self._writer.do(lambda store: store.questions.answer(self._lease.consumer, askers, answer))

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _let_go_of_bell(self) -> None:
        self._stop_timer()
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.take_down()


async def sweep(writer: Writer, bells: WakeUps) -> frozenset[str]:
    """Give the tasks of consumers whose processes died to the others; the bells that are registered."""
    registered = await writer.do(Store.consumers)
    await bury(writer, bells, registered)
    await writer.do(Store.remove_lost)
    return frozenset(bell for _, bell in registered if isinstance(bell, str))


async def bury(writer: Writer, bells: WakeUps, registered: Iterable[tuple[int, object]]) -> None:
    """Remove those of the consumers, given with their bells, whose processes died."""
    try:
        dead = [(number, bell) for number, bell in registered if not bells.is_held(bell)]
    except OSError as error:
        raise translate(error, writer.path) from error
    if dead:
        await writer.do(partial(Store.remove_dead, dead=dead))
        for _, bell in dead:
            bells.take_down(bell)
