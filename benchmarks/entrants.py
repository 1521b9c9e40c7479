"""Who takes part, and what each is set to. All: durable, confirmed, acknowledged after the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

#: What follows `python -m`. A worker's has {queue} where it must be told its queue.
Command: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Entrant:
    """One way to enqueue and to run. ``settings``: what RESULTS.md says of it."""

    name: str
    settings: str
    producer: Command
    worker: Command
    workers: int = 1
    #: How many processes run tasks in each worker.
    children: int = 1
    #: Enqueues that wait for their confirm at the same time.
    outstanding: int = 256
    is_ours: bool = False
    #: Tasks of one measurement, relative to the others': fewer for slow ones, and more for several processes, which
    #: must be at work together.
    share: float = 1.0


def _ours(name: str, settings: str, how: str, *options: str) -> Entrant:
    worker = ("leveret", "worker", "benchmarks.ours:app", "--log-level", "WARNING", *options)
    return Entrant(name, settings, ("benchmarks.ours", how), worker, is_ours=True)


def _peer(name: str, settings: str, module: str, worker: Command = (), share: float = 1.0) -> Entrant:
    module = f"benchmarks.peers.{module}"
    return Entrant(name, settings, (module,), worker or (module, "work"), share=share)


_PREFETCH = ("--concurrency", "256", "--prefetch", "1000")
_TWICE = ("--processes", "2", "--concurrency", "256", "--prefetch", "2000")
OURS_MANY = _ours(
    "leveret, enqueue_many", "batches of 1,000; one child, --concurrency 256, --prefetch 1000", "many", *_PREFETCH
)
OURS = _ours("leveret, enqueue", "256 outstanding; one child, --concurrency 256, --prefetch 1000", "each", *_PREFETCH)
OURS_AUTO = _ours("leveret, as it comes", "enqueue_many; no option of the worker given", "many")
OURS_AUTO_EACH = replace(OURS_AUTO, name="leveret, enqueue, as it comes", producer=OURS.producer)
OURS_TWO_CHILDREN = replace(
    _ours("leveret, two children", "as enqueue_many, --processes 2 --prefetch 2000", "many", *_TWICE),
    children=2,
    share=10.0,
)
OURS_TWO_WORKERS = replace(OURS_MANY, name="leveret, two workers", settings="as enqueue_many", workers=2, share=15.0)
OURS_FOUR_WORKERS = replace(OURS_MANY, name="leveret, four workers", settings="as enqueue_many", workers=4, share=20.0)
OURS_KEPT = Entrant(
    "leveret, results kept",
    "one child, --concurrency 256, --prefetch 1000; one enqueue after the other",
    ("benchmarks.kept", "wait"),
    ("leveret", "worker", "benchmarks.kept:app", "--log-level", "WARNING", *_PREFETCH),
    is_ours=True,
)
OURS_CHAINED = replace(
    OURS_KEPT,
    name="leveret, chains",
    worker=("leveret", "worker", "benchmarks.chained:app", "--log-level", "WARNING", *_PREFETCH),
)
OURS_SCHEDULED = replace(
    OURS_KEPT,
    name="leveret, a hundred schedules",
    worker=("leveret", "worker", "benchmarks.scheduled:app", "--log-level", "WARNING"),
)
OURS_UNSCHEDULED = replace(
    OURS_SCHEDULED,
    name="leveret, no schedules",
    worker=("leveret", "worker", "benchmarks.scheduled:without", "--log-level", "WARNING"),
)

#: More than ever run at once.
UNREACHED = 1_000
#: Starts a second.
RATE = 100
#: Tenants with few tasks, and how many each has; all others are one tenant's.
TENANTS, EACH = 100, 10
KEYS = 10_000


def _limited(name: str, settings: str, app: str, *options: str) -> Entrant:
    worker = ("leveret", "worker", f"benchmarks.limited:{app}", "--log-level", "INFO", *options)
    return Entrant(f"leveret, {name}", settings, ("benchmarks.limited", app), worker, is_ours=True)


LIMITED, UNLIMITED = (
    _limited(name, "enqueue_many; one child, --concurrency 256, --prefetch 1000", app, *_PREFETCH)
    for name, app in (("a limit that is not reached", "limited"), ("no limit", "without"))
)
COMPUTING_LIMITED, COMPUTING = (
    _limited(name, "enqueue_many; no option of the worker given", app)
    for name, app in (("1 ms with such a limit", "computing_limited"), ("1 ms without", "computing"))
)
RATED = _limited("100 starts a second", "enqueue_many; no option of the worker given", "rated")
FAIR = _limited("tenants in turn", "enqueue_many; no option of the worker given", "fair")
KEYED = replace(_limited("a limit by key", "enqueue_many; two workers, no option given", "keyed"), workers=2)
OURS_ONE_BY_ONE = replace(OURS, name="leveret, one by one", settings="one enqueue after the other", outstanding=1)
OURS_SYNC = _ours("leveret, enqueue_sync", "one after the other, without an event loop", "sync", *_PREFETCH)

BY_HAND = _peer("aio-pika by hand", "plain connection, 256 outstanding, prefetch 256, JSON", "by_hand")
MASTER = _peer("aio_pika.patterns.Master", "256 outstanding, prefetch 256, pickle", "master")
FASTSTREAM = _peer("FastStream", "256 outstanding, prefetch 256, AckPolicy.NACK_ON_ERROR", "faststream_app", share=0.6)
TASKIQ = _peer(
    "taskiq-aio-pika",
    "256 outstanding, qos 256, one worker process, --ack-type when_executed, --max-async-tasks 256",
    "taskiq_app",
    (
        *("taskiq", "worker", "benchmarks.peers.taskiq_app:broker", "--workers", "1", "--log-level", "WARNING"),
        *("--ack-type", "when_executed", "--max-async-tasks", "256"),
    ),
    share=0.6,
)
_CELERY = (
    "celery",
    "-A",
    "benchmarks.peers.celery_app",
    "worker",
    "--without-gossip",
    "--without-mingle",
    "-l",
    "WARNING",
)
CELERY_SOLO = _peer(
    "Celery, solo",
    "acks_late, confirm_publish, prefetch multiplier 256, no results",
    "celery_app",
    (*_CELERY, "-P", "solo"),
    share=0.3,
)
CELERY_PREFORK = replace(
    _peer("Celery, prefork", "as solo, two processes", "celery_app", (*_CELERY, "-P", "prefork", "-c", "2"), share=0.3),
    children=2,
)
DRAMATIQ = _peer(
    "Dramatiq",
    "confirm_delivery, one process, 8 threads; its own durable classic queue",
    "dramatiq_app",
    ("dramatiq", "benchmarks.peers.dramatiq_app", "--processes", "1", "--threads", "8"),
    share=0.3,
)
TARSK = _peer(
    "tarsk-amqp",
    "its defaults, one child",
    "tarsk_app",
    (
        *("benchmarks.peers.tarsk_app", "worker", "--app", "benchmarks.peers.tarsk_app:app", "--children", "1"),
        *("--queues", "{queue}"),
    ),
    share=0.3,
)
POTATOQ = _peer(
    "potatoq",
    "its defaults, one process that is not recycled",
    "potatoq_app",
    (
        *("potatoq", "-A", "benchmarks.peers.potatoq_app", "worker", "-c", "1", "-Q", "{queue}", "-l", "WARNING"),
        *("--max-tasks-per-child", "1000000"),
    ),
    share=0.2,
)
HUEY = _peer(
    "Huey",
    "fsync, write-ahead log, one thread, no results",
    "huey_app",
    ("huey.bin.huey_consumer", "benchmarks.peers.huey_app.huey", "-w", "1", "-k", "thread", "-q"),
)
SQLITE = _peer("SQLite itself", "Leveret's tables, ready-made rows, 1,000 a transaction", "sqlite_itself", share=10.0)
WIRE = _peer("the wire itself", "a raw socket, ready-made frames, 1,024 outstanding, acks by 64", "wire", share=10.0)
