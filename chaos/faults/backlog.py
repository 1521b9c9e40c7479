"""A very long queue: the worker's memory and its pace must not depend on the length."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from chaos.app import work
from chaos.faults.fault import Fault

if TYPE_CHECKING:
    from chaos.stage import Stage

#: Tasks that are enqueued in one call.
_BATCH = 5_000
#: How much more memory the worker may have with the backlog (bytes), and how much slower it may be.
_MORE_MEMORY = 64 * 1024 * 1024
_SLOWER = 8.0
_PAGE = 4096


def backlog(stage: Stage) -> None:
    """The same number of tasks is run twice: when they are all that there is, and out of the whole backlog."""
    count = stage.profile.backlog if stage.target.kind == "sqlite" else stage.profile.backlog_rabbitmq
    sample = min(count // 2, 20_000)
    _enqueue(stage, sample)
    few, memory = _run(stage, sample)
    _enqueue(stage, count)
    stage.fault_ended()
    many, memory_of_many = _run(stage, sample)
    stats = stage.stats()
    stage.queued = stats.ready if stats else 0
    stage.note = (
        f"{few:.0f} tasks/s of {sample}, {many:.0f} tasks/s of {count}; "
        f"the worker has {memory / 1e6:.0f} MB, then {memory_of_many / 1e6:.0f} MB; {stage.queued} left in the queue"
    )
    assert memory_of_many < memory + _MORE_MEMORY, f"memory is not flat: {stage.note}"
    assert many * _SLOWER > few, f"claiming is not flat: {stage.note}"


def _enqueue(stage: Stage, count: int) -> None:
    for start in range(0, count, _BATCH):
        stage.put(work, [(0.0,)] * min(_BATCH, count - start))


def _run(stage: Stage, count: int) -> tuple[float, int]:
    """Have a new worker run at least so many tasks: how many a second, and its memory at the end (bytes)."""
    stage.book.read()
    before = len(stage.book.tasks)
    worker = stage.add_worker()
    stage.wait_for(lambda: len(stage.book.tasks) >= before + count // 10, "the first tenth is begun")
    stage.wait_for(lambda: len(stage.book.tasks) >= before + count, "the sample is begun")
    memory = sum(_resident(pid) for pid in (worker.pid, *_children(worker.pid)))
    worker.signal(signal.SIGTERM)
    stage.stop_workers()
    stage.book.read()
    begun = sorted(run.starts[0] for run in stage.book.tasks.values())[before + count // 10 :]
    return (len(begun) - 1) / (begun[-1] - begun[0]), memory


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


FAULTS = (Fault("backlog", "a million waiting tasks: memory and pace stay flat", backlog),)
