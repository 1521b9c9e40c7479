"""The faults, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos.faults import processes

if TYPE_CHECKING:
    from chaos.faults.fault import Fault

FAULTS: tuple[Fault, ...] = (*processes.FAULTS,)
