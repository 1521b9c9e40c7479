"""What a worker tells Prometheus: what it counted of its tasks, and how it and its queues are when it is scraped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from leveret.errors import BrokerError
from leveret.observe.events import ChildReplaced, ScheduleAdvanced, TaskFinished, TaskSettled, TaskStarted
from leveret.observe.metrics.server import Answer, serving
from leveret.observe.telemetry import UNKNOWN, Kind, kind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from prometheus_client.metrics_core import Metric

    from leveret.model import Envelope, LimitUse, QueueStats
    from leveret.observe.events import Event
    from leveret.observe.metrics import Address, Source

log = logging.getLogger("leveret.metrics")

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RUN_TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0)
_LATENESS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3_600.0)
_WAIT_TIMES = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0)
#: The queues are counted at most so often: on RabbitMQ all workers are asked (seconds).
_FRESH = 5.0
#: How long that may take (seconds).
_COUNT_WITHIN = 3.0
#: How often the loop's lag is looked at, and for how long the worst of it is shown (seconds).
_TICK = 0.25
_LAG_SHOWN = 15.0

#: The label of all schedules that are data.
_DATA = "(data)"

Ending: TypeAlias = Kind | Literal["lost"]
_OUTCOMES: tuple[Ending, ...] = (*get_args(Kind), "lost")


class Exporter:
    """Listens to a worker, and serves ``/metrics``, ``/live`` and ``/ready``."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._registry = CollectorRegistry()
        self._source: Source | None = None
        self._begun: dict[tuple[str, str, int], float] = {}
        self._series: dict[tuple[str, str], _Series] = {}
        self._lag = _Lag()
        self._queues = _Queues()
        self._tasks = Counter(
            "leveret_tasks",
            "Attempts by how they ended. lost: the delivery was lost before the outcome was recorded.",
            ("task", "queue", "outcome"),
            registry=self._registry,
        )
        self._run_time = Histogram(
            "leveret_task_run_seconds",
            "How long attempts ran.",
            ("task", "queue"),
            buckets=_RUN_TIMES,
            registry=self._registry,
        )
        self._wait_time = Histogram(
            "leveret_task_wait_seconds",
            "From the enqueueing, or from when it was due, to the start.",
            ("task", "queue"),
            buckets=_WAIT_TIMES,
            registry=self._registry,
        )
        self._replaced = Counter(
            "leveret_child_restarts", "Child processes that were replaced.", ("reason",), registry=self._registry
        )
        for reason in ("died", "overran", "blocked", "recycled", "unfit"):
            self._replaced.labels(reason)
        self._schedules = _Schedules(self._registry)
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def hear(self, event: Event) -> None:
        """What the worker tells its listeners."""
        if isinstance(event, TaskStarted):
            self._started(event.envelope, time.time())
        elif isinstance(event, TaskFinished):
            begun = self._begun.pop(_attempt(event.envelope), None)
            if begun is not None:
                self._of(event.envelope).run_time.observe(time.monotonic() - begun)
        elif isinstance(event, TaskSettled):
            self._of(event.envelope).ended(_ending(event))
        elif isinstance(event, ChildReplaced):
            self._replaced.labels(event.reason).inc()
        elif isinstance(event, ScheduleAdvanced):
            self._schedules.advanced(event)

    @asynccontextmanager
    async def serve(self, source: Source) -> AsyncGenerator[None]:
        """Serve inside the block. Raises ConfigurationError if it cannot listen there."""
        self._source = source
        pages = {"/metrics": self._metrics, "/live": self._live, "/ready": self._ready}
        async with serving(self._address, pages) as (host, port):
            log.info("metrics are on http://%s/metrics", f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            watching = asyncio.create_task(self._lag.watch())
            try:
                yield
            finally:
                watching.cancel()

    def collect(self) -> Iterator[Metric]:
        """For the registry: what is not counted but asked."""
        yield GaugeMetricFamily(
            "leveret_loop_lag_seconds",
            f"How late the worker's event loop turned at worst in the last {_LAG_SHOWN:g} s.",
            self._lag.worst(),
        )
        if self._source is not None:
            condition = self._source.condition()
            yield GaugeMetricFamily("leveret_worker_consuming", "1: tasks come to this worker.", condition.consuming)
            yield GaugeMetricFamily("leveret_worker_running", "Tasks that this worker runs.", condition.running)
            yield GaugeMetricFamily(
                "leveret_worker_prefetched", "Tasks that this worker holds and has not begun.", condition.waiting
            )
            yield CounterMetricFamily(
                "leveret_connection_losses", "How often the connection that brings tasks was lost.", condition.losses
            )
        yield from self._queues.collect()

    async def _metrics(self) -> Answer:
        if self._source is not None:
            await self._queues.refresh(self._source)
            # A series that is born at 1 has no increase: what has not run yet is at 0.
            for labels in self._source.tasks():
                self._labelled(labels)
        return Answer(generate_latest(self._registry).decode(), content_type=_CONTENT_TYPE)

    async def _live(self) -> Answer:
        return Answer("live\n")

    async def _ready(self) -> Answer:
        if self._source is not None and self._source.condition().consuming:
            return Answer("ready\n")
        return Answer("no tasks come: the worker is connecting, or stopping\n", HTTPStatus.SERVICE_UNAVAILABLE)

    def _started(self, envelope: Envelope, now: float) -> None:
        self._begun[_attempt(envelope)] = time.monotonic()
        # Of an attempt that is made again at once it is not known since when it waited.
        since = envelope.due if envelope.attempt > 1 else _latest(envelope.enqueued_at, envelope.due)
        if since is not None:
            self._of(envelope).wait_time.observe(max(0.0, now - since))

    def _of(self, envelope: Envelope) -> _Series:
        return self._labelled(((self._source and self._source.registered(envelope)) or UNKNOWN, envelope.queue))

    def _labelled(self, labels: tuple[str, str]) -> _Series:
        series = self._series.get(labels)
        if series is None:
            series = _Series(self._tasks, self._run_time.labels(*labels), self._wait_time.labels(*labels), labels)
            self._series[labels] = series
        return series


class _Series:
    """What is counted of one task in one queue: finding a series by its labels takes longer than counting."""

    def __init__(self, tasks: Counter, run_time: Histogram, wait_time: Histogram, labels: tuple[str, str]) -> None:
        # All at once: of a series that is born at 1 Prometheus sees no increase.
        self._outcomes = {outcome: tasks.labels(*labels, outcome) for outcome in _OUTCOMES}
        self.run_time = run_time
        self.wait_time = wait_time

    def ended(self, outcome: Ending) -> None:
        self._outcomes[outcome].inc()


class _Schedules:
    """What this worker has stored of schedules."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("schedule",)
        self._tasks = Counter("leveret_schedule_tasks", "Tasks that were stored.", labels, registry=registry)
        self._missed = Counter(
            "leveret_schedule_missed",
            "Instants that passed without a task, since no worker was there.",
            labels,
            registry=registry,
        )
        self._skipped = Counter(
            "leveret_schedule_skipped",
            "Instants without a task, since the one before was not finished.",
            labels,
            registry=registry,
        )
        self._lateness = Histogram(
            "leveret_schedule_lateness_seconds",
            "How much later than they were due tasks were stored.",
            labels,
            buckets=_LATENESS,
            registry=registry,
        )

    def advanced(self, event: ScheduleAdvanced) -> None:
        # Of those that are data there may be any number: they are one series.
        label = event.schedule if event.origin is not None else _DATA
        self._tasks.labels(label).inc(len(event.lateness))
        self._missed.labels(label).inc(event.missed)
        self._skipped.labels(label).inc(event.skipped)
        lateness = self._lateness.labels(label)
        for seconds in event.lateness:
            lateness.observe(seconds)


class _Lag:
    """How late the loop's timers are: it is late when something keeps it from turning."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=int(_LAG_SHOWN / _TICK))

    def worst(self) -> float:
        return max(self._seen, default=0.0)

    async def watch(self) -> None:
        while True:
            due = time.monotonic() + _TICK
            await asyncio.sleep(_TICK)
            self._seen.append(max(0.0, time.monotonic() - due))


class _Queues:
    """The counts of the worker's queues and of limits, asked for when they are wanted and not fresh."""

    def __init__(self) -> None:
        self._counts: Sequence[QueueStats] | None = None
        self._limits: Sequence[LimitUse] = ()
        self._until = 0.0
        self._asking = asyncio.Lock()

    async def refresh(self, source: Source) -> None:
        async with self._asking:
            if time.monotonic() < self._until:
                return
            try:
                async with asyncio.timeout(_COUNT_WITHIN):
                    # A worker that is ready has a queue at least: before, it has asked nobody.
                    self._counts = await source.stats() or None
                    self._limits = await source.limits()
            except (BrokerError, TimeoutError) as error:
                log.debug("the queues cannot be counted: %s", error)
                self._counts, self._limits = None, ()
            self._until = time.monotonic() + _FRESH

    def collect(self) -> Iterator[Metric]:
        """Old counts would be taken for new ones: there are none when they cannot be had."""
        yield GaugeMetricFamily("leveret_broker_up", "1: the queues could be counted.", self._counts is not None)
        for name, text in (
            ("ready", "Tasks that can run now."),
            ("limited", "Tasks that wait for a limit, or for their turn."),
            ("running", "Tasks that workers hold."),
            ("delayed", "Tasks that are not due."),
            ("dead", "Dead letters."),
            ("consumers", "Consumers."),
            ("paused", "1: nothing of the queue is started."),
        ):
            family = GaugeMetricFamily(
                f"leveret_queue_{name}", f"{text} Of the whole queue, whichever worker says so.", labels=("queue",)
            )
            for counts in self._counts or ():
                family.add_metric((counts.name,), float(getattr(counts, name)))
            yield family
        if not self._limits:
            return
        for name, text in (
            ("admitted", "Tasks that have a permit of the limit."),
            ("waiting", "Tasks that wait for the limit."),
            ("paused", "1: nothing of the limit is admitted."),
        ):
            family = GaugeMetricFamily(
                f"leveret_limit_{name}", f"{text} Over all workers, whichever says so.", labels=("limit",)
            )
            for one in self._limits:
                family.add_metric((one.row.name,), float(one.row.paused if name == "paused" else getattr(one, name)))
            yield family


def _ending(event: TaskSettled) -> Ending:
    if not event.kept:
        return "lost"
    ending = kind(event.outcome)
    # What was acknowledged before it ran does not run again, whatever its policy would have been.
    return "dead" if event.at_most_once and ending == "retrying" else ending


def _attempt(envelope: Envelope) -> tuple[str, str, int]:
    return envelope.queue, envelope.id, envelope.attempt


def _latest(*moments: float | None) -> float | None:
    return max((moment for moment in moments if moment is not None), default=None)
