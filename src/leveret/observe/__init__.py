"""What a worker does, for people and programs: events, logs, telemetry, metrics."""

from __future__ import annotations

from leveret.observe.events import (
    ChildReplaced,
    Event,
    Listener,
    ScheduleAdvanced,
    TaskBlocks,
    TaskFinished,
    TaskSettled,
    TaskStarted,
    WorkerReady,
    WorkerStopping,
    write,
    write_log,
)
from leveret.observe.limited_log import LimitedLog
from leveret.observe.listening import BACKLOG, Counted, Repeated, accept, most_open
from leveret.observe.logs import Format, Logging, log_mistake, quieten_connections
from leveret.observe.rates import WINDOW, QueueRates, Rate, Rates, WorkerRates
from leveret.observe.telemetry import Telemetry, attempting_within, sending_within

__all__ = [
    "BACKLOG", "WINDOW", "ChildReplaced", "Counted", "Event", "Format", "LimitedLog", "Listener", "Logging",
    "QueueRates", "Rate", "Rates", "Repeated", "ScheduleAdvanced", "TaskBlocks", "TaskFinished", "TaskSettled",
    "TaskStarted", "Telemetry", "WorkerRates", "WorkerReady", "WorkerStopping", "accept", "attempting_within",
    "log_mistake", "most_open", "quieten_connections", "sending_within", "write", "write_log",
]  # fmt: skip
