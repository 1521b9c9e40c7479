"""The worker: takes deliveries, has them run, settles their outcomes."""

from __future__ import annotations

from leveret.worker.autoscale import Bounds, Processes, Scaler
from leveret.worker.prefetch import MOST_PREFETCH, Prefetch
from leveret.worker.program import MOST_CONCURRENCY, run_worker
from leveret.worker.worker import DEFAULT_GRACE, Worker

__all__ = [
    "DEFAULT_GRACE",
    "MOST_CONCURRENCY",
    "MOST_PREFETCH",
    "Bounds",
    "Prefetch",
    "Processes",
    "Scaler",
    "Worker",
    "run_worker",
]
