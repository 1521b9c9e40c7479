"""The faults, by name."""

from __future__ import annotations

from chaos.faults import processes
from chaos.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (*processes.FAULTS,)
