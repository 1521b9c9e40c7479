"""The faults, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.faults import backlog, cluster, poison, processes, rabbitmq, sqlite

if TYPE_CHECKING:
    from chaos.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *processes.FAULTS,
    *poison.FAULTS,
    *sqlite.FAULTS,
    *rabbitmq.FAULTS,
    *cluster.FAULTS,
    *backlog.FAULTS,
)
