"""The worker: takes deliveries, has them run, settles their outcomes. It runs no user code itself.

One delivery's way: `_admit` -> `_fill` -> the executor -> `_on_reports` -> `_settle`. Stopping has two stages: first
the taking ends and what runs may finish, then what is left is given up and handed back.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import Counter, deque
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, TypeVar

from leveret.brokers import location
from leveret.errors import BrokerError
from leveret.executors import (
    Awaits,
    Blocks,
    Died,
    Executor,
    ExecutorEvent,
    Finished,
    Overran,
    Progressed,
    RunRequest,
    Started,
)
from leveret.model import DeadLettered, Delivery, Outcome, Released, Retrying, Settlement, Succeeded
from leveret.model.arguments import seconds
from leveret.observe import (
    ChildReplaced,
    Event,
    Listener,
    TaskBlocks,
    TaskFinished,
    TaskSettled,
    TaskStarted,
    WorkerReady,
    WorkerStopping,
    write_log,
)
from leveret.observe.metrics import Condition
from leveret.worker import intake as admission
from leveret.worker.autoscale import Scaler, Work
from leveret.worker.awaiting import Awaiting
from leveret.worker.cancellations import NOT_RUN, Cancellations
from leveret.worker.prefetch import TICK, Pace, credit
from leveret.worker.redelivery import Redelivery, RedeliveryCache, attempt
from leveret.worker.reporter import WorkerReporter
from leveret.worker.settler import Settler

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence
    from datetime import timedelta
    from typing import Any

    from leveret.brokers import Broker, Consumer
    from leveret.executors import Manifest
    from leveret.model import CancelRequest, Envelope, QueueStats

log = logging.getLogger("leveret.worker")

T = TypeVar("T")

#: How long a worker may go on running what it has when it is told to stop (seconds).
DEFAULT_GRACE = 30.0
#: Successes are recorded so many at once, or after so long (seconds), as long as other work waits here meanwhile.
_MOST_GATHERED = 64
_GATHER = 0.005
#: What is to be recorded when the worker ends may take so long (seconds).
SHUTDOWN_TIMEOUT = 5.0
_GIVEN_UP = DeadLettered("its worker stopped before it had ended")


class Worker:
    """Runs the tasks of some queues on an executor until it is told to stop.

    ``queues``: their names; all of the application's by default. ``prefetch``: how many deliveries of each queue it
    holds at once, running or waiting; "auto" is the executor's slots, so that of one queue nothing waits here that
    another worker could run, and on SQLite, while tasks are short, some milliseconds' work more (`prefetch`).
    ``grace``: seconds, or a timedelta. ``broker``: one to use instead of the application's URL. ``scaler``: changes the
    executor's slots; where credit is for good, as on RabbitMQ, "auto" is then the most that there may be.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        queues: Sequence[str] = (),
        prefetch: admission.Prefetch = "auto",
        grace: float | timedelta = DEFAULT_GRACE,
        listeners: Sequence[Listener] = (),
        broker: Broker | None = None,
        scaler: Scaler | None = None,
    ) -> None:
        self._executor = executor
        self._names = queues
        self._scaler = scaler
        self._credit = admission.first_credit(prefetch, executor.slots)
        self._pace = Pace(time.monotonic()) if prefetch == "auto" else None
        self._deciding: asyncio.TimerHandle | None = None
        self._grace = seconds("grace", grace)
        self._listeners = tuple(listeners)
        self._given_broker = broker
        self._keys = itertools.count()
        self._backlog: deque[Delivery] = deque()
        self._jobs: dict[int, Delivery] = {}
        #: How many have run.
        self._ended = 0
        #: The jobs by queue and task id, and how others ended: for deliveries that come again.
        self._keys_by_task: dict[tuple[str, str], int] = {}
        self._repeats = RedeliveryCache()
        #: Of the jobs that are acknowledged before they run: those that will be in a moment, and those that were.
        self._acknowledging: set[int] = set()
        self._acknowledged: set[int] = set()
        self._cancellations = Cancellations()
        self._awaiting = Awaiting(lambda: executor.slots)
        self._settling: set[asyncio.Task[None]] = set()
        #: Successes that are recorded in a moment, and when.
        self._gathered: list[Settlement] = []
        self._recording: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()
        self._halt = asyncio.Event()
        self._idle = asyncio.Event()
        self._consumer: Consumer | None = None
        #: The application as it is now; None before it is loaded.
        self._application: Manifest | None = None

    def stop(self) -> None:
        """Stop taking and finish what runs, within the grace. Called again: stop at once. Nothing is lost."""
        if self._stop.is_set():
            self._halt.set()
        self._stop.set()

    def condition(self) -> Condition:
        """How it is now."""
        consumer = self._consumer
        is_taking = consumer is not None and consumer.connected and not self._stop.is_set()
        losses = 0 if consumer is None else consumer.losses
        return Condition(is_taking, running=len(self._jobs), waiting=len(self._backlog), losses=losses)

    async def stats(self) -> Sequence[QueueStats]:
        """What is in its queues; nothing before it is ready. Raises BrokerError."""
        return () if self._consumer is None else await self._broker.stats(self._queues)

    def tasks(self) -> Sequence[tuple[str, str]]:
        """The names and queues of those that it is there to run; nothing before it is ready."""
        if self._consumer is None:
            return ()
        tasks = self._known.tasks.items()
        return [(task, options.queue) for task, options in tasks if options.queue in self._queues]

    def registered(self, envelope: Envelope) -> str | None:
        """The task that runs it; None: its application has none."""
        known = self._application
        name = None if known is None else known.task_of(envelope)
        return name if known is not None and name in known.tasks else None

    async def run(self) -> None:
        """Work until `stop`. Raises AppNotLoaded, ConfigurationError or BrokerRefused when it cannot."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._executor.stop)
            manifest = await self._until_stopped(self._executor.start(self._on_reports))
            if manifest is None:
                return
            self._application = self._manifest = manifest
            queues = admission.select(self._names, manifest)
            self._broker = self._given_broker or admission.connected(manifest.url, manifest.keep_results)
            self._recorder = Settler(self._broker, manifest)
            stack.callback(self._recorder.stop)
            stack.callback(self._awaiting.stop)
            self._describer = WorkerReporter(
                [queue.name for queue in queues], manifest.default_tasks, self._executor.children, self._held
            )
            if self._given_broker is None:
                stack.push_async_callback(self._broker.close)
            if self._scaler is not None and self._pace is not None and self._broker.fixed_credit:
                self._credit = min(admission.MOST_PREFETCH, self._scaler.most_slots)
            opening = stack.enter_async_context(
                self._broker.consume(queues, credit=self._credit, describe=self._describer)
            )
            consumer = await self._until_stopped(opening)
            if consumer is None:
                return
            self._consumer, self._queues = consumer, [queue.name for queue in queues]
            place = location(manifest.url) if self._given_broker is None else ""
            self._tell(WorkerReady(self._queues, place))
            admission.tell_of_tasks(manifest)
            admission.warn_of_long_tasks(consumer, manifest)
            await self._work(consumer)

    def adopt(self, manifest: Manifest) -> None:
        """Take an application that was loaded again as it is now. Its queues stay those that it had at the start."""
        self._application = manifest
        self._recorder.adopt(manifest)
        new = {queue.name for queue in manifest.queues} - {queue.name for queue in self._manifest.queues}
        if new or manifest.url != self._manifest.url:
            log.warning("the application has other queues or another URL now: start this worker again for those")

    @property
    def _known(self) -> Manifest:
        assert self._application is not None
        return self._application

    def _work_here(self) -> Work:
        return Work(len(self._jobs), len(self._backlog), self._ended)

    async def _ready_elsewhere(self) -> int:
        paused = frozenset() if self._consumer is None else self._consumer.paused
        return await self._broker.ready([name for name in self._queues if name not in paused])

    async def _until_stopped(self, beginning: Coroutine[Any, Any, T]) -> T | None:
        """What has begun, or None when the worker was stopped first: an import may hang, a broker may be away."""
        task = asyncio.create_task(beginning)
        stopped = asyncio.create_task(self._stop.wait())
        await _first_of(task, stopped, self._executor.broken)
        stopped.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        if self._executor.broken.done():
            self._executor.broken.result()
        return None

    async def _work(self, consumer: Consumer) -> None:
        taking = asyncio.create_task(self._take(consumer))
        stopped = asyncio.create_task(self._stop.wait())
        broken = self._executor.broken
        scalers = [] if self._scaler is None else [self._scaler]
        scaling = [asyncio.create_task(one.run(self._work_here, self._ready_elsewhere, self._fill)) for one in scalers]
        try:
            await _first_of(taking, stopped, broken, *scaling)
            for scaler in scaling:
                scaler.cancel()
            self._tell(WorkerStopping(len(self._jobs), self._grace))
            await consumer.stop()
            self._hand_back_backlog()
            if self._stop.is_set():
                await self._finish_running()
            await self._give_up()
            for failed in (taking, broken, *scaling):
                if failed.done() and not failed.cancelled():
                    failed.result()
        finally:
            if self._deciding is not None:
                self._deciding.cancel()
            for task in (taking, stopped, *scaling):
                task.cancel()
            await asyncio.gather(taking, stopped, *scaling, return_exceptions=True)

    async def _take(self, consumer: Consumer) -> None:
        paused: frozenset[str] = frozenset()
        # Once more when it is stopped: nothing comes any more, but what still runs may be cancelled.
        for _ in range(2):
            async for batch in consumer:
                if paused != consumer.paused:
                    paused = consumer.paused
                    names = ", ".join(sorted(paused)) or "none any more"
                    log.info("paused queues, of which nothing is started: %s", names)
                for mark in consumer.marks():
                    self._cancel(mark)
                self._admit(batch, paused)

    def _cancel(self, mark: CancelRequest) -> None:
        """Somebody wants the task to end, or not to run if it comes."""
        if keys := self._cancellations.note(mark, self._jobs):
            self._executor.cancel(keys)
        self._backlog = deque(self._without_cancelled(self._backlog))

    def _without_cancelled(self, deliveries: Iterable[Delivery]) -> Iterable[Delivery]:
        """Those of the deliveries that nobody has cancelled; the others are settled, and wait for no slot."""
        cancelled = [delivery for delivery in deliveries if self._cancellations.covers(delivery)]
        if not cancelled:
            return deliveries
        self._settle([(delivery, NOT_RUN) for delivery in cancelled])
        return [delivery for delivery in deliveries if delivery not in cancelled]

    def _admit(self, batch: Sequence[Delivery], paused: frozenset[str]) -> None:
        fresh = [delivery for delivery in batch if not self._is_known(delivery)]
        # A mark may be read before the task, or together with it.
        self._backlog.extend(self._without_cancelled(fresh))
        if self._stop.is_set():
            self._hand_back_backlog()  # dealt in the moment of the stop
        elif paused:
            self._hand_back_backlog(paused)
        self._fill()

    def _fill(self) -> None:
        """Submit as much of the backlog as the executor has slots for."""
        jobs: list[RunRequest] = []
        dead: list[Settlement] = []
        now = time.time()
        room = 0 if self._stop.is_set() else self._executor.slots - len(self._jobs)
        while self._backlog and room > 0:
            delivery = self._backlog.popleft()
            if not delivery.lease.held:
                continue  # the broker has given it to another consumer, or will give it to this one again
            verdict = admission.dead_already(delivery, now)
            if verdict is not None:
                dead.append((delivery, verdict))
                continue
            key = next(self._keys)
            room -= 1
            self._jobs[key] = delivery
            self._keys_by_task[_task(delivery)] = key
            if self._pace is not None:
                self._pace.began(key, time.monotonic())
            if self._is_at_most_once(delivery):
                self._acknowledging.add(key)
                self._background(self._begin_once(key))
            else:
                jobs.append(RunRequest(key, delivery.envelope))
        if jobs:
            self._executor.submit(jobs)
        if self._jobs:
            self._decide_soon()
        if dead:
            self._settle(dead)

    def _decide_soon(self) -> None:
        """On the credit, as long as anything runs."""
        if self._pace is not None and self._deciding is None:
            self._deciding = asyncio.get_running_loop().call_later(TICK, self._decide, self._pace)

    def _decide(self, pace: Pace) -> None:
        run_time, present = pace.run_time(time.monotonic()), self._credit
        if run_time is not None and present is not None and not self._stop.is_set():
            wanted = credit(run_time, slots=self._executor.slots, queues=len(self._queues), present=present)
            if wanted != present:
                self._background(self._change_credit(wanted))
                return
        self._decide_again()

    def _decide_again(self) -> None:
        self._deciding = None
        if self._jobs:
            self._decide_soon()

    async def _change_credit(self, wanted: int) -> None:
        assert self._consumer is not None
        try:
            if not await self._consumer.set_credit(wanted):
                self._pace = None
                return
        except BrokerError as error:
            log.info("still holding %d deliveries of each queue, not %d: %s", self._credit, wanted, error)
        else:
            self._credit = wanted
            self._hand_back_excess(wanted)
        self._decide_again()

    def _hand_back_excess(self, most: int) -> None:
        """What waits beyond the credit may be run by another worker: the newest of it."""
        held = Counter(delivery.envelope.queue for delivery in self._jobs.values())
        waiting, self._backlog = self._backlog, deque()
        back: list[Settlement] = []
        for delivery in waiting:
            held[delivery.envelope.queue] += 1
            if held[delivery.envelope.queue] <= most:
                self._backlog.append(delivery)
            else:
                back.append((delivery, Released()))
        if back:
            self._settle(back)

    def _is_known(self, delivery: Delivery) -> bool:
        """Whether it is one that came before and was lost with its connection: it runs still, or it has run.

        Then that run is this delivery's, and nothing is started again.
        """
        key = self._keys_by_task.get(_task(delivery))
        running = None if key is None else self._jobs[key]
        is_again = running is not None and not running.lease.held and attempt(running) == attempt(delivery)
        if key is not None and is_again and delivery.returns < admission.MAX_RETURNS:
            if key in self._acknowledged:
                self._settle_repeat(Redelivery(delivery, None))
            else:
                self._jobs[key] = delivery
            return True
        if not delivery.returns:
            return False
        if self._repeats.waits(delivery):
            return True
        repeat = self._repeats.find(delivery)
        if repeat is not None:
            self._settle_repeat(repeat)
        return repeat is not None

    def _settle_repeat(self, repeat: Redelivery) -> None:
        if repeat.outcome is None:
            self._background(self._acknowledge_again(repeat.delivery))
        else:
            self._settle([(repeat.delivery, repeat.outcome)])

    async def _acknowledge_again(self, delivery: Delivery) -> None:
        """Everything else is recorded, and told."""
        await self._recorder.record([(delivery, Succeeded())])

    def _finish(self, key: int) -> Delivery:
        """Take a job from those that run."""
        delivery = self._jobs.pop(key)
        self._awaiting.forget(key)
        self._ended += 1
        if self._pace is not None:
            self._pace.ended(key, time.monotonic())
        if self._keys_by_task.get(_task(delivery)) == key:
            del self._keys_by_task[_task(delivery)]
        return delivery

    def _held(self) -> int:
        return len(self._backlog) + len(self._jobs)

    def _is_at_most_once(self, delivery: Delivery) -> bool:
        return self._known.options_of(delivery.envelope).acknowledge == "before"

    async def _begin_once(self, key: int) -> None:
        """Have the broker forget a task, and then run it. If it is lost first and comes again, that one is meant."""
        delivery = self._jobs[key]
        while await self._recorder.record([(delivery, Succeeded())], self._recorder.acknowledged(delivery.envelope)):
            again = self._jobs.get(key, delivery)
            if again is delivery:
                self._acknowledging.discard(key)
                if key in self._jobs:
                    self._finish(key)
                    self._fill()
                return
            delivery = again
        self._acknowledging.discard(key)
        if key in self._jobs:
            self._repeats.acknowledged(delivery)
            self._acknowledged.add(key)
            self._executor.submit([RunRequest(key, delivery.envelope, once=True)])
        else:
            await self._tell_ended(delivery, _GIVEN_UP)

    def _on_reports(self, reports: Sequence[ExecutorEvent]) -> None:
        settlements: list[Settlement] = []
        for report in reports:
            if isinstance(report, ChildReplaced):
                self._tell(report)
                continue
            delivery = self._jobs.get(report.key)
            if delivery is None:
                continue
            if isinstance(report, (Started, Progressed, Awaits, Blocks)):
                self._tell_of_run(delivery, report)
                continue
            self._finish(report.key)
            outcome = report.outcome if isinstance(report, Finished) else self._after_death(delivery.envelope, report)
            outcome = self._cancellations.judged(report.key, outcome)
            self._describer.ended(outcome)
            if isinstance(report, Finished):
                self._recorder.ran(delivery, report.seconds)
            if self._listeners:
                self._tell(TaskFinished(delivery.envelope, outcome))
            if report.key in self._acknowledged:
                self._acknowledged.discard(report.key)
                self._background(self._tell_ended(delivery, outcome))
            else:
                settlements.append((delivery, outcome))
        self._fill()
        if settlements:
            self._settle_soon(settlements)
        self._note_idle()

    def _tell_of_run(self, delivery: Delivery, report: Started | Progressed | Awaits | Blocks) -> None:
        envelope = delivery.envelope
        if isinstance(report, Started):
            self._recorder.started(envelope)
            if self._listeners:
                self._tell(TaskStarted(envelope))
        elif isinstance(report, Progressed):
            # Of a task that may run elsewhere by now, that one tells.
            if delivery.lease.held or report.key in self._acknowledged:
                self._recorder.progressed(envelope, report.progress)
        elif isinstance(report, Awaits):
            self._awaiting.note(report.key, awaits=report.is_so)
        else:
            self._tell(TaskBlocks(envelope, report.seconds, report.stack))

    def _after_death(self, envelope: Envelope, death: Died | Overran) -> Outcome:
        """A death is an attempt. The next one needs no wait, except after a timeout: a child is there already."""
        policy = self._known.options_of(envelope).policy
        if policy.may_try_again(envelope.attempt):
            wait = policy.delay(envelope.attempt, random.random()) if isinstance(death, Overran) else 0.0  # noqa: S311
            return Retrying(death.cause, delay=wait)
        return DeadLettered(f"{death.cause}; attempt {envelope.attempt} of {policy.max_attempts} failed")

    def _settle(self, settlements: Sequence[Settlement]) -> None:
        self._background(self._record_and_tell(settlements))

    def _settle_soon(self, settlements: Sequence[Settlement]) -> None:
        """Gather successes, unless the broker may have to have them before it sends what could run meanwhile."""
        self._gathered += settlements
        is_busy = len(self._backlog) >= self._executor.slots and not self._stop.is_set()
        if not is_busy or len(self._gathered) >= _MOST_GATHERED or not all(map(_is_success, settlements)):
            self._settle_gathered()
        elif self._recording is None:
            self._recording = asyncio.get_running_loop().call_later(_GATHER, self._settle_gathered)

    def _settle_gathered(self) -> None:
        if self._recording is not None:
            self._recording.cancel()
            self._recording = None
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._settle(gathered)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._settling.add(task)
        self._note_idle()
        task.add_done_callback(self._settling.discard)
        task.add_done_callback(lambda _: self._note_idle())

    async def _record_and_tell(self, settlements: Sequence[Settlement]) -> None:
        attempts = self._repeats.begin(settlements)
        held = [settlement for settlement in settlements if settlement[0].lease.held]
        updates = self._recorder.settled(held)
        if len(held) < len(settlements):
            self._recorder.forget([delivery.envelope for delivery, _ in settlements if not delivery.lease.held])
        lost = await self._recorder.record(settlements, updates)
        for repeat in self._repeats.end(attempts, settlements, lost):
            self._settle_repeat(repeat)
        # Nearly all that a worker has to tell is that a task is done, and perhaps nobody listens.
        is_heard = bool(self._listeners) or log.isEnabledFor(logging.INFO)
        for delivery, outcome in settlements:
            kept = delivery.envelope.id not in lost
            seconds = self._recorder.run_time(delivery)
            if is_heard or not kept or not isinstance(outcome, Succeeded):
                self._tell(TaskSettled(delivery.envelope, outcome, kept=kept, seconds=seconds))

    async def _tell_ended(self, delivery: Delivery, outcome: Outcome) -> None:
        """Of a task that was acknowledged before it ran: it does not run again."""
        final: Outcome = _GIVEN_UP if isinstance(outcome, Released) else outcome
        if isinstance(outcome, Retrying):
            final = DeadLettered(outcome.error, outcome.traceback)
        await self._recorder.record((), self._recorder.settled([(delivery, final)]))
        told = final if final is _GIVEN_UP else outcome
        seconds = self._recorder.run_time(delivery)
        self._tell(TaskSettled(delivery.envelope, told, at_most_once=True, seconds=seconds))

    def _hand_back_backlog(self, queues: frozenset[str] | None = None) -> None:
        """What waits here goes back to its queue; with ``queues``, only what is from those."""
        waiting, self._backlog = self._backlog, deque()
        back: list[Settlement] = []
        for delivery in waiting:
            if queues is None or delivery.envelope.queue in queues:
                back.append((delivery, Released()))
            else:
                self._backlog.append(delivery)
        if back:
            self._settle(back)

    async def _finish_running(self) -> None:
        """Until nothing runs that can end, the grace is over, or a second stop."""
        self._settle_gathered()
        self._note_idle()
        ends = (self._idle.wait(), self._halt.wait(), self._awaiting.until_stuck(self._jobs.keys))
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(end) for end in ends]
        await asyncio.wait(waits, timeout=self._grace, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()

    async def _give_up(self) -> None:
        """End the executor and hand back what it still had; what can't be settled goes back with the consumer."""
        await self._executor.stop()
        self._settle_gathered()
        left: list[Settlement] = []
        for key, delivery in self._jobs.items():
            if key in self._acknowledged:
                self._background(self._tell_ended(delivery, _GIVEN_UP))
            elif key not in self._acknowledging:
                left.append((delivery, Released()))
        self._jobs.clear()
        self._keys_by_task.clear()
        if left:
            self._settle(left)
        if self._settling:
            await asyncio.wait(self._settling, timeout=SHUTDOWN_TIMEOUT)
        for task in self._settling:
            task.cancel()

    def _note_idle(self) -> None:
        if self._jobs or self._gathered or self._settling:
            self._idle.clear()
        else:
            self._idle.set()

    def _tell(self, event: Event) -> None:
        for listener in (write_log, *self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", type(event).__name__)


def _task(delivery: Delivery) -> tuple[str, str]:
    return delivery.envelope.queue, delivery.envelope.id


def _is_success(settlement: Settlement) -> bool:
    return isinstance(settlement[1], Succeeded)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
