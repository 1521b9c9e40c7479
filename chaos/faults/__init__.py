"""The faults, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.faults import backlog, cluster, limits, poison, processes, rabbitmq, schedules, sqlite, unique

if TYPE_CHECKING:
    from chaos.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *processes.FAULTS,
    *poison.FAULTS,
    *schedules.FAULTS,
    *unique.FAULTS,
    *sqlite.FAULTS,
    *rabbitmq.FAULTS,
    *cluster.FAULTS,
    *backlog.FAULTS,
    # Last: each fault of a quick run has its broker by its place.
    *limits.FAULTS,
)
