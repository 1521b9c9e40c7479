"""What Linux tells of a process and its children: memory and processor time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def family(pid: int) -> list[int]:
    """A process and all that it started, however deep."""
    children = _read(Path(f"/proc/{pid}/task/{pid}/children")).split()
    return [pid, *(one for child in children for one in family(int(child)))]


def resident(pids: Sequence[int]) -> int:
    """Bytes in memory, without shared memory: the ledger of the benchmark is there."""
    return sum(_kilobytes(pid, "RssAnon") + _kilobytes(pid, "RssFile") for pid in pids) * 1024


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time used by all threads that live (nanoseconds are counted, not ticks)."""
    threads = (thread for pid in pids for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int((_read(thread) or "0").split()[0]) for thread in threads) / 1e9


def _read(path: Path) -> str:
    """Nothing when the process or the thread has ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _kilobytes(pid: int, field: str) -> int:
    for line in _read(Path(f"/proc/{pid}/status")).splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0])
    return 0
