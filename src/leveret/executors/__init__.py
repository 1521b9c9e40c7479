"""Where tasks run: child processes, or this process."""

from __future__ import annotations

from leveret.executors.base import (
    START_TIMEOUT,
    STOP_TIMEOUT,
    Awaits,
    Blocks,
    Died,
    Executor,
    ExecutorEvent,
    Finished,
    Manifest,
    Overran,
    Progressed,
    Report,
    Returned,
    RunRequest,
    Started,
)
from leveret.executors.in_process import InProcessExecutor
from leveret.executors.loops import Loop
from leveret.executors.orphans import reaping
from leveret.executors.processes import ProcessExecutor, Recycling

__all__ = [
    "START_TIMEOUT", "STOP_TIMEOUT", "Awaits", "Blocks", "Died", "Executor", "ExecutorEvent", "Finished",
    "InProcessExecutor", "Loop", "Manifest",
    "Overran", "ProcessExecutor", "Progressed", "Recycling", "Report", "Returned", "RunRequest",
    "Started", "reaping",
]  # fmt: skip
