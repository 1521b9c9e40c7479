"""The worker: takes deliveries, has them run, settles their outcomes. It runs no user code itself.

A delivery becomes a `Job`: `Intake` -> `Dispatcher` -> the executor -> `Dispatcher` -> `Settler`. Stopping has two
stages: first the taking ends and what runs may finish, then what is left is given up and handed back.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leveret.brokers import CancelRequests, Deliveries, Paused, backoff, location
from leveret.errors import BrokerError
from leveret.model import waiting_key
from leveret.model.arguments import seconds
from leveret.observe import ChildReplaced, WorkerReady, WorkerStopping
from leveret.observe.metrics import Condition
from leveret.worker.application import Application, connected, log_tasks, select, warn_of_long_tasks
from leveret.worker.autoscale import Work
from leveret.worker.awaiting import Awaiting
from leveret.worker.dispatch import Dispatcher, Intake
from leveret.worker.job import Jobs
from leveret.worker.limits import LimitKeeper
from leveret.worker.prefetch import MOST_PREFETCH, AdaptiveCredit, first_credit
from leveret.worker.reporter import Listeners, WorkerReporter
from leveret.worker.scheduler import Scheduler
from leveret.worker.settler import Settler, StatusUpdates
from leveret.worker.stopping import Background, Stop, first_of, until_stopped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from leveret.brokers import Broker, Consumer
    from leveret.executors import Executor, ExecutorEvent, Manifest
    from leveret.model import Delivery, Envelope, LimitUse, QueueStats
    from leveret.observe import Listener
    from leveret.worker.autoscale import Scaler
    from leveret.worker.prefetch import Prefetch

log = logging.getLogger("leveret.worker")

#: How long a worker may go on running what it has when it is told to stop (seconds).
DEFAULT_GRACE = 30.0
#: What is to be recorded when the worker ends may take so long (seconds).
SHUTDOWN_TIMEOUT = 5.0


class Worker:
    """Runs the tasks of some queues on an executor until it is told to stop.

    Args:
        executor: Runs the tasks: a ``ProcessExecutor`` or an ``InProcessExecutor``.
        queues: The names of the queues. Empty: all of the application's.
        prefetch: The most deliveries of each queue that the worker holds at once, running or waiting: 1 to 65535.
            "auto": the executor's slots, so that of one queue nothing waits here that another worker could run, and
            while tasks are short some milliseconds' work more. "unlimited": no limit.
        grace: How long what runs may go on when the worker stops (seconds, or a timedelta).
        listeners: Functions that are called with each event of the worker.
        broker: The broker, in place of the one that the application's URL names. The worker does not close it.
        scaler: Changes the executor's slots. Where the prefetch cannot be changed later (a RabbitMQ queue with a single
            active consumer), "auto" is then the most slots that there may be. None: the slots stay.

    Raises:
        ConfigurationError: ``prefetch`` or ``grace`` is not what it must be.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        queues: Sequence[str] = (),
        prefetch: Prefetch = "auto",
        grace: float | timedelta = DEFAULT_GRACE,
        listeners: Sequence[Listener] = (),
        broker: Broker | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        self._executor = executor
        self._names = queues
        self._credit = first_credit(prefetch, executor.slots)
        self._is_auto = prefetch == "auto"
        self._grace = seconds("grace", grace)
        self._listeners = Listeners(listeners)
        self._given_broker = broker
        self._scaler = scaler
        self._application = Application()
        self._jobs = Jobs()
        self._stop = Stop()
        self._session: Session | NoSession = NoSession(self._listeners)

    def stop(self) -> None:
        """Stop taking and finish what runs, within the grace. Called again: stop at once. Nothing is lost."""
        self._stop.ask()

    def condition(self) -> Condition:
        """How it is now."""
        is_taking = self._session.is_connected and not self._stop.is_set()
        running = self._jobs.running(self._executor.slots)
        return Condition(is_taking, running=running, waiting=self._jobs.held - running, losses=self._session.losses)

    async def stats(self) -> Sequence[QueueStats]:
        """What is in the worker's queues.

        Returns:
            The counts of each queue; nothing before the worker is ready.

        Raises:
            BrokerError: The broker cannot be asked.
        """
        return await self._session.stats()

    async def limits(self) -> Sequence[LimitUse]:
        """The broker's limits, and what they do.

        Returns:
            Each; nothing before the worker is ready.

        Raises:
            BrokerError: The broker cannot be asked.
        """
        return await self._session.limit_uses()

    def tasks(self) -> Sequence[tuple[str, str]]:
        """The names and queues of those that it is there to run; nothing before it is ready."""
        return self._application.tasks(self._session.queues)

    def registered(self, envelope: Envelope) -> str | None:
        """The task that runs it; None: its application has none."""
        return self._application.registered(envelope)

    def adopt(self, manifest: Manifest) -> None:
        """Take an application that was loaded again as it is now. Its queues stay those that it had at the start."""
        self._application.adopt(manifest)

    async def run(self) -> None:
        """Work until ``stop`` is called.

        Raises:
            AppNotLoaded: The application cannot be imported, or its lifespan cannot be entered.
            ConfigurationError: The application cannot be run as it is.
            BrokerRefused: The broker refuses this client.
        """
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._executor.stop)
            starting = self._executor.start(lambda events: self._session.on_events(events))
            manifest = await until_stopped(starting, self._stop, self._executor)
            if manifest is None:
                return
            self._application.start(manifest)
            session = await self._connect(manifest, stack)
            if session is None:
                return
            self._session = session
            place = location(manifest.url) if self._given_broker is None else ""
            self._listeners.notify(WorkerReady(list(session.queues), place))
            log_tasks(manifest)
            warn_of_long_tasks(session.consumer, manifest)
            await self._work(session)

    async def _connect(self, manifest: Manifest, stack: AsyncExitStack) -> Session | None:
        """Begin to consume, until the stack is left; None: the worker was stopped first."""
        queues = select(self._names, manifest)
        names = [queue.name for queue in queues]
        broker = self._given_broker or connected(manifest.url, manifest.keep_results)
        updates = StatusUpdates(broker, self._application)
        stack.callback(updates.stop)
        if self._given_broker is None:
            stack.push_async_callback(broker.close)
        limits = LimitKeeper(broker, self._application, names)
        await until_stopped(limits.declare(), self._stop, self._executor)
        reporter = WorkerReporter(names, manifest.default_tasks, self._executor.children, lambda: self._jobs.held)
        credit = self._credit
        most = credit if self._scaler is None or not self._is_auto else min(MOST_PREFETCH, self._scaler.most_slots)
        opening = stack.enter_async_context(broker.consume(queues, credit=credit, most=most, describe=reporter))
        consumer = await until_stopped(opening, self._stop, self._executor)
        if consumer is None:
            return None
        session = self._assemble(broker, consumer, names, credit, updates, reporter, limits)
        stack.callback(session.close)
        return session

    def _assemble(
        self,
        broker: Broker,
        consumer: Consumer,
        queues: Sequence[str],
        credit: int | None,
        updates: StatusUpdates,
        reporter: WorkerReporter,
        limits: LimitKeeper,
    ) -> Session:
        """Make what works on the jobs of this run."""
        executor, jobs, stop, application = self._executor, self._jobs, self._stop, self._application
        background = Background()
        settler = Settler(broker, jobs, updates, self._listeners, background)
        intake = Intake(executor, jobs, settler, stop)
        adaptive = None
        if credit is not None and self._is_auto and consumer.adjusts_credit:
            adaptive = AdaptiveCredit(
                credit,
                consumer=consumer,
                queues=len(queues),
                slots=lambda: executor.slots,
                jobs=jobs,
                background=background,
                stop=stop,
                shrunk=intake.limit,
            )
        awaiting = Awaiting(lambda: executor.slots, jobs)
        dispatcher = Dispatcher(
            executor,
            application,
            jobs,
            intake,
            settler,
            updates,
            adaptive,
            awaiting,
            reporter,
            self._listeners,
            background,
            stop,
        )
        return Session(
            broker, consumer, queues, jobs, intake, dispatcher, settler, adaptive, awaiting, background, limits
        )

    def _work_here(self) -> Work:
        running = self._jobs.running(self._executor.slots)
        return Work(running, self._jobs.held - running, self._jobs.left)

    async def _work(self, session: Session) -> None:
        taking = asyncio.create_task(session.take())
        stopped = asyncio.create_task(self._stop.wait())
        broken = self._executor.broken
        scalers = [] if self._scaler is None else [self._scaler]
        beside = [
            asyncio.create_task(one.run(self._work_here, session.ready, session.dispatcher.fill)) for one in scalers
        ]
        beside.append(asyncio.create_task(Scheduler(session.broker, self._application, self._listeners).run()))
        beside.append(asyncio.create_task(session.limits.run()))
        try:
            await first_of(taking, stopped, broken, *beside)
            for task in beside:
                task.cancel()
            await self._end(session)
            for failed in (taking, broken, *beside):
                if failed.done() and not failed.cancelled():
                    failed.result()
        finally:
            for task in (taking, stopped, *beside):
                task.cancel()
            await asyncio.gather(taking, stopped, *beside, return_exceptions=True)

    async def _end(self, session: Session) -> None:
        """Let go of all jobs: at once, unless the end is a stop."""
        self._listeners.notify(WorkerStopping(len(self._jobs.begun), self._grace))
        await session.consumer.stop()
        session.intake.hand_back()
        if self._stop.is_set():
            await session.finish_running(self._stop, self._grace)
        await session.give_up(self._executor)


class NoSession:
    """Before it is connected: no queues, and nothing comes."""

    is_connected = False
    queues: Sequence[str] = ()
    #: How often the connection was lost.
    losses = 0

    def __init__(self, listeners: Listeners) -> None:
        self._listeners = listeners

    async def stats(self) -> Sequence[QueueStats]:
        return ()

    async def limit_uses(self) -> Sequence[LimitUse]:
        return ()

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        for event in events:
            if isinstance(event, ChildReplaced):
                self._listeners.notify(event)


@dataclass(frozen=True)
class Session:
    """What a worker has from when it is connected: the broker, its consumer, and what works on the jobs that come."""

    broker: Broker
    consumer: Consumer
    queues: Sequence[str]
    jobs: Jobs
    intake: Intake
    dispatcher: Dispatcher
    settler: Settler
    #: None: the credit stays what it is.
    credit: AdaptiveCredit | None
    awaiting: Awaiting
    background: Background
    limits: LimitKeeper

    @property
    def is_connected(self) -> bool:
        return self.consumer.connected

    @property
    def losses(self) -> int:
        """How often the connection was lost."""
        return self.consumer.losses

    async def stats(self) -> Sequence[QueueStats]:
        """What is in its queues. Raises BrokerError."""
        return await self.broker.queues.stats(self.queues)

    async def limit_uses(self) -> Sequence[LimitUse]:
        """What limits do. Raises BrokerError."""
        return await self.broker.limits.read()

    async def ready(self) -> int:
        """How many tasks wait with the broker that may be run. Raises BrokerError."""
        paused = self.consumer.paused
        return await self.broker.queues.ready([name for name in self.queues if name not in paused])

    async def take(self) -> None:
        """Act on what arrives until the consumer is stopped."""
        async for arrival in self.consumer:
            match arrival:
                case Deliveries(deliveries):
                    self.limits.see(deliveries)
                    self.intake.admit(self._without_waiting_keys(deliveries))
                case CancelRequests(requests):
                    for request in requests:
                        self.intake.cancel(request)
                case Paused(paused):
                    names = ", ".join(sorted(paused)) or "none any more"
                    log.info("paused queues, of which nothing is started: %s", names)
                    self.intake.pause(paused)
            self.dispatcher.fill()

    def _without_waiting_keys(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Those that are admitted now; the others are when their unique keys are free."""
        keyed = [one for one in deliveries if one.envelope.headers and waiting_key(one.envelope.headers) is not None]
        if not keyed:
            return deliveries
        self.background.start(self._admit_freed(keyed))
        return [one for one in deliveries if one not in keyed]

    async def _admit_freed(self, deliveries: Sequence[Delivery]) -> None:
        """A task must not begin while another one, which may know more, is refused for its sake."""
        keys = [(key, one.envelope.id) for one in deliveries if (key := waiting_key(one.envelope.headers)) is not None]
        for pause in backoff():
            try:
                await self.broker.unique.free(keys)
            except BrokerError as error:
                log.warning("%d tasks do not begin, as their unique keys cannot be freed now: %s", len(keys), error)
                await asyncio.sleep(pause)
            else:
                break
        self.intake.admit(deliveries)
        self.dispatcher.fill()

    def on_events(self, events: Sequence[ExecutorEvent]) -> None:
        """The executor tells something."""
        self.dispatcher.on_events(events)

    async def finish_running(self, stop: Stop, grace: float) -> None:
        """Wait until nothing runs that can end, the grace is over, or a second stop."""
        self.settler.flush()
        ends = (self._all_settled(), stop.wait_for_second(), self.awaiting.until_stuck())
        waits: list[asyncio.Task[None]] = [asyncio.create_task(end) for end in ends]
        await asyncio.wait(waits, timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _all_settled(self) -> None:
        # After a stop no job begins, so nothing runs any more once nothing does.
        await self.jobs.until_none_begun()
        await self.background.until_done()

    async def give_up(self, executor: Executor) -> None:
        """End the executor and hand back what it still had; what can't be settled goes back with the consumer."""
        await executor.stop()
        self.settler.flush()
        self.settler.give_up(list(self.jobs.begun.values()))
        await self.background.close(SHUTDOWN_TIMEOUT)

    def close(self) -> None:
        """Decide, say and record nothing more; what was delivered and is not settled goes back with the consumer."""
        if self.credit is not None:
            self.credit.stop()
        self.settler.stop()
        self.awaiting.stop()
