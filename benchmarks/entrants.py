"""Who takes part, and what each is set to. All: durable, confirmed, acknowledged after the run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

#: What follows `python -m`.
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
    #: Tasks of one measurement, relative to the others': slower ones need fewer for the same time.
    share: float = 1.0


def _ours(name: str, settings: str, how: str, *options: str) -> Entrant:
    worker = ("leveret", "worker", "benchmarks.ours:app", "--log-level", "WARNING", *options)
    return Entrant(name, settings, ("benchmarks.ours", how), worker, is_ours=True)


def _peer(name: str, settings: str, module: str, worker: Command = (), share: float = 1.0) -> Entrant:
    module = f"benchmarks.peers.{module}"
    return Entrant(name, settings, (module,), worker or (module, "work"), share=share)


_PREFETCH = ("--prefetch", "256")
OURS_MANY = _ours(
    "leveret, enqueue_many", "batches of 1,000; one child, --concurrency 10, --prefetch 256", "many", *_PREFETCH
)
OURS = _ours("leveret, enqueue", "256 outstanding; one child, --concurrency 10, --prefetch 256", "each", *_PREFETCH)
OURS_AUTO = _ours("leveret, as it comes", "enqueue_many; no option of the worker given", "many")
OURS_TWO_CHILDREN = replace(
    _ours("leveret, two children", "as enqueue_many, --processes 2", "many", *_PREFETCH, "--processes", "2"),
    children=2,
)
OURS_TWO_WORKERS = replace(OURS_MANY, name="leveret, two workers", settings="as enqueue_many", workers=2)
OURS_FOUR_WORKERS = replace(OURS_MANY, name="leveret, four workers", settings="as enqueue_many", workers=4)
OURS_ONE_BY_ONE = replace(OURS, name="leveret, one by one", settings="one enqueue after the other", outstanding=1)

BY_HAND = _peer("aio-pika by hand", "plain connection, 256 outstanding, prefetch 256, JSON", "by_hand")
MASTER = _peer("aio_pika.patterns.Master", "256 outstanding, prefetch 256, pickle", "master")
