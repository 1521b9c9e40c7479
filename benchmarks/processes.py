"""What Linux tells of a process and its children: memory and processor time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def family(pid: int) -> list[int]:
    """A process and all that it started, however deep."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def resident(pids: Sequence[int]) -> int:
    """Bytes in memory, without shared memory: the ledger of the benchmark is there."""
    return sum(_kilobytes(pid, "RssAnon") + _kilobytes(pid, "RssFile") for pid in pids) * 1024


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time used by all threads that live (nanoseconds are counted, not ticks)."""
    spent = (Path(f"/proc/{pid}/task").glob("*/schedstat") for pid in pids)
    return sum(int(thread.read_text().split()[0]) for threads in spent for thread in threads) / 1e9


def _kilobytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0])
    return 0
