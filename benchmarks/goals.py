"""Who meets whom, and what is to be reached. The numbers are promises: change one only with an ADR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import entrants as e

if TYPE_CHECKING:
    from benchmarks.entrants import Entrant


@dataclass(frozen=True)
class Goal:
    """A bound on a ratio (ours to the peer's) or on a number of ours alone."""

    text: str
    figure: str
    bound: float
    at_least: bool = True
    unit: str = "x"

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}"


@dataclass(frozen=True)
class Duel:
    """Two that are measured right after one another, in each round. ``quick``: in `make bench-quick` too."""

    ours: Entrant
    peer: Entrant
    goals: tuple[Goal, ...] = ()
    quick: bool = False


def _enqueue(text: str, bound: float) -> Goal:
    return Goal(text, "enqueue", bound)


def _run(text: str, bound: float) -> Goal:
    return Goal(text, "run", bound)


DUELS: dict[str, tuple[Duel, ...]] = {
    "rabbitmq": (
        Duel(
            e.OURS_MANY,
            e.MASTER,
            (
                _enqueue("RabbitMQ, enqueue_many, to Master's enqueue", 3),
                _run("RabbitMQ, no-op tasks, one child, to Master's", 1.8),
            ),
            quick=True,
        ),
        Duel(e.OURS_MANY, e.WIRE, (_enqueue("RabbitMQ, enqueue_many, to the wire", 0.8),), quick=True),
        Duel(e.OURS, e.MASTER, (_enqueue("RabbitMQ, 256 concurrent enqueues, to Master's", 1.6),)),
        Duel(
            e.OURS,
            e.TASKIQ,
            (
                _enqueue("RabbitMQ, 256 concurrent enqueues, to taskiq's", 2.5),
                _run("RabbitMQ, no-op tasks, one child, to taskiq's", 4),
            ),
            quick=True,
        ),
        Duel(e.OURS_TWO_CHILDREN, e.OURS_MANY, (_run("RabbitMQ, no-op tasks, two children to one", 1),)),
        Duel(e.OURS_TWO_WORKERS, e.OURS_MANY, (_run("RabbitMQ, no-op tasks, two workers to one", 1),)),
        Duel(e.OURS_AUTO, e.OURS_MANY),
        Duel(e.OURS, e.BY_HAND),
        Duel(e.OURS, e.FASTSTREAM),
        Duel(e.OURS, e.CELERY_SOLO),
        Duel(e.OURS_TWO_CHILDREN, e.CELERY_PREFORK),
        Duel(e.OURS, e.DRAMATIQ),
        Duel(e.OURS, e.TARSK),
        Duel(e.OURS, e.POTATOQ),
    ),
    "sqlite": (
        Duel(
            e.OURS_MANY,
            e.HUEY,
            (
                _enqueue("SQLite, enqueue_many, to Huey's enqueue", 10),
                _run("SQLite, no-op tasks, one child, to Huey's", 4),
            ),
            quick=True,
        ),
        Duel(e.OURS_MANY, e.SQLITE, (_enqueue("SQLite, enqueue_many, to SQLite's own inserts", 0.6),), quick=True),
        Duel(e.OURS_SYNC, e.HUEY, (_enqueue("SQLite, one enqueue_sync at a time, to Huey's", 1),), quick=True),
        Duel(e.OURS_ONE_BY_ONE, e.HUEY, (_enqueue("SQLite, one enqueue at a time, to Huey's", 0.75),), quick=True),
        Duel(e.OURS_TWO_WORKERS, e.OURS_MANY, (_run("SQLite, no-op tasks, two workers on one file to one", 1),)),
        Duel(e.OURS_FOUR_WORKERS, e.OURS_MANY, (_run("SQLite, no-op tasks, four workers on one file to one", 0.8),)),
        Duel(e.OURS_TWO_CHILDREN, e.OURS_MANY),
        Duel(e.OURS_AUTO, e.OURS_MANY),
        Duel(e.OURS_ONE_BY_ONE, e.POTATOQ),
    ),
}

#: At a rate of 200 a second, one enqueue at a time. On RabbitMQ beside the bare client, on SQLite by itself.
LATENCY: dict[str, tuple[Goal, ...]] = {
    "rabbitmq": (
        Goal("RabbitMQ, enqueue to start at 200/s, median, to bare aio-pika", "median", 1.5, at_least=False),
        Goal("RabbitMQ, enqueue to start at 200/s, 99th percentile, to bare aio-pika", "p99", 1.5, at_least=False),
    ),
    "sqlite": (Goal("SQLite, enqueue to start, median", "median", 3, at_least=False, unit="ms"),),
}
#: While others do 5,000 tasks a second on the same broker.
RESULTS: dict[str, tuple[Goal, ...]] = {
    "rabbitmq": (
        Goal("RabbitMQ, enqueue and result, busy to quiet, median", "result, busy to quiet", 2, at_least=False),
        Goal(
            "RabbitMQ, enqueue and result, busy to quiet, 99th percentile",
            "result p99, busy to quiet",
            10,
            at_least=False,
        ),
        Goal(
            "RabbitMQ, enqueue and result, busy to quiet, processor time",
            "result cpu, busy to quiet",
            1.5,
            at_least=False,
        ),
        Goal("RabbitMQ, status in another program, processor time", "status cpu", 50, at_least=False, unit="ms"),
        Goal("RabbitMQ, status in another program", "status", 250, at_least=False, unit="ms"),
    ),
    "sqlite": (),
}
#: Tasks with a key of their own each, 200 calls at once; and a program that begins beside many that are there.
UNIQUE: dict[str, tuple[Goal, ...]] = {
    "rabbitmq": (
        Goal("RabbitMQ, enqueues of unique tasks, 200 at once", "unique", 3_000, unit="/s"),
        Goal(
            "RabbitMQ, the first unique task beside 100,000 and a million that ended",
            "seconds",
            3,
            at_least=False,
            unit="s",
        ),
        Goal("RabbitMQ, the same: memory", "MB", 30, at_least=False, unit="MB"),
    ),
    "sqlite": (
        Goal("SQLite, enqueues of unique tasks to plain ones, 200 at once", "unique to plain", 0.7),
        Goal("SQLite, enqueue_many of unique tasks to plain ones", "unique many to plain many", 0.7),
    ),
}
#: Chains of ten no-op steps beside the same tasks, each enqueued by itself.
CHAINS: dict[str, tuple[Goal, ...]] = {
    kind: (
        Goal(f"{name}, a chain's step to a plain enqueue and run", "step to plain", 1.3, at_least=False),
        Goal(f"{name}, steps of chains", "steps", least, unit="/s"),
    )
    for kind, name, least in (("rabbitmq", "RabbitMQ", 2_000), ("sqlite", "SQLite", 2_000))
}
#: A worker with a hundred schedules, of which none falls due, to one without.
SCHEDULES: dict[str, tuple[Goal, ...]] = {
    kind: (
        Goal(f"{name}, a hundred schedules, share of a core more", "idle more", 0.2, at_least=False, unit="%"),
        Goal(f"{name}, a hundred schedules, memory more", "MB more", 6, at_least=False, unit="MB"),
    )
    for kind, name in (("rabbitmq", "RabbitMQ"), ("sqlite", "SQLite"))
}
#: A limit that is not reached beside none, a rate, tenants in turn, and on RabbitMQ many keys and what one gate lets
#: through.
LIMITS: dict[str, tuple[Goal, ...]] = {
    kind: (
        Goal(f"{name}, a limit that is not reached, 1 ms of work: processor time", "1 ms", 1.1, at_least=False),
        Goal(f"{name}, Rate(100): starts in 60 s, off 6,000", "off", 100, at_least=False, unit="tasks"),
        Goal(f"{name}, Rate(100): most starts in a second", "most", 110, at_least=False, unit="tasks"),
        Goal(f"{name}, 100 tenants with ten tasks behind 100,000 of one, to alone", "fair", 2, at_least=False),
        *more,
    )
    for kind, name, more in (
        (
            "rabbitmq",
            "RabbitMQ",
            (
                Goal("RabbitMQ, through one gate", "through", 5_000, unit="/s"),
                Goal("RabbitMQ, 10,000 keys: takeover", "takeover", 3, at_least=False, unit="s"),
                Goal("RabbitMQ, 10,000 keys: memory more", "MB more", 100, at_least=False, unit="MB"),
            ),
        ),
        (
            "sqlite",
            "SQLite",
            (Goal("SQLite, a limit that is not reached, no-ops: processor time", "no-op", 1.3, at_least=False),),
        ),
    )
}
FOOTPRINT: dict[str, tuple[Goal, ...]] = {
    kind: (
        Goal(f"{name}, idle worker and child, share of a core", "idle", 0.5, at_least=False, unit="%"),
        Goal(f"{name}, memory of worker and child at rest", "at rest", 90, at_least=False, unit="MB"),
        Goal(f"{name}, memory, growth over 200,000 tasks", "growth", 5, at_least=False, unit="MB"),
    )
    for kind, name in (("rabbitmq", "RabbitMQ"), ("sqlite", "SQLite"))
}
CLAIM: dict[str, Goal] = {
    kind: Goal(f"{name}, a claim at a backlog of 1,000,000, to one of 1,000", "claim", 1.2, at_least=False)
    for kind, name in (("rabbitmq", "RabbitMQ"), ("sqlite", "SQLite"))
}
STARTUP: tuple[Goal, ...] = (
    Goal("import leveret, over bare Python", "import", 60, at_least=False, unit="ms"),
    Goal("leveret --help", "help", 200, at_least=False, unit="ms"),
)
