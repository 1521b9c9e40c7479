"""Where tasks run: in child processes (`processes`), or in this process (`in_process`). One interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from leveret.brokers import censor
from leveret.model import Envelope, LimitRule, Outcome, Progress, Queue, RunningTask, Schedule, TaskOptions
from leveret.observe import ChildReplaced

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from leveret.client import App
    from leveret.model import ChildReport


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """What a worker must know of an application without importing it."""

    url: str
    queues: list[Queue]
    #: queue -> the task of its messages that name none.
    default_tasks: dict[str, str]
    tasks: dict[str, TaskOptions]
    #: How long results and statuses are kept (seconds).
    keep_results: float
    #: The schedules of its code, and what their application is called.
    schedules: list[Schedule] = []
    origin: str = ""
    #: What its code says of limits, by their names, and the queues with tasks that wait for limits or their turn.
    limits: dict[str, LimitRule] = {}
    limited_queues: list[str] = []

    def __repr__(self) -> str:
        return f"Manifest({censor(self.url)!r}, {self.queues}, ...)"

    @classmethod
    def of(cls, app: App, reference: str = "") -> Manifest:
        """``reference``: how the application is named to whoever imports it; empty: it is not."""
        origin = reference or f"{app.module}:{','.join(sorted(app.registry.queues))}"
        return cls(
            url=app.url,
            queues=list(app.queues),
            default_tasks=app.default_tasks,
            tasks={task.name: task.task_options.for_worker() for task in app.tasks},
            keep_results=app.keep_results,
            schedules=app.registry.schedules(origin),
            origin=origin,
            limits=app.registry.limit_rules(),
            limited_queues=app.registry.limited_queues(),
        )

    def task_of(self, envelope: Envelope) -> str | None:
        """The name of the task that a message is for; None: it names none, and its queue has no default task."""
        return envelope.task if envelope.task is not None else self.default_tasks.get(envelope.queue)

    def options_of(self, envelope: Envelope) -> TaskOptions:
        """How a message's task is run: as its decorator says, but for what the message says itself."""
        return self.tasks.get(self.task_of(envelope) or "", _UNKNOWN_TASK).for_message(envelope.headers)


#: No message is run as a task that is not registered, but a child may die before it says so.
_UNKNOWN_TASK = TaskOptions()


class RunRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An envelope to run, under the number its worker knows it by."""

    key: int
    envelope: Envelope
    #: It is acknowledged already: whatever becomes of its process, it must not be started a second time.
    once: bool = False


def running(job: RunRequest, since: float) -> RunningTask:
    envelope = job.envelope
    return RunningTask(envelope.id, envelope.task, envelope.queue, envelope.attempt, since)


class Started(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The tasks of jobs are about to be called: from here on a death of their process is charged to them."""

    keys: list[int]
    #: Seconds that each may run; None: no limit.
    timeout: float | None = None


class Finished(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """The job's outcome."""

    key: int
    outcome: Outcome
    #: How long it ran; None: it did not.
    seconds: float | None = None


class Returned(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Jobs that had not begun are given back, as `Executor.recall` wanted: they do not run."""

    keys: list[int]


class Died(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The process that ran the job ended under it, and how."""

    key: int
    cause: str


class Overran(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The job outlasted its timeout and did not end when it was told to; its process was killed."""

    key: int
    cause: str


class Progressed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The job says how far it is."""

    key: int
    progress: Progress


class Blocks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The event loop that runs the job does not turn, because of it as far as can be told. It runs on."""

    key: int
    #: How long it has not turned (seconds).
    seconds: float
    #: Where the loop's thread is.
    stack: str


class Awaits(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The job waits for the results of other tasks, of which some have not begun; or it does not any more."""

    key: int
    is_so: bool


Report: TypeAlias = Started | Progressed | Finished | Returned | Died | Overran | Blocks | Awaits
#: What an executor tells its worker.
ExecutorEvent: TypeAlias = Report | ChildReplaced

#: How long a child process may take to import the application and to enter its lifespan (seconds).
START_TIMEOUT = 120.0
#: How long a lifespan may take to end (seconds).
STOP_TIMEOUT = 5.0
#: What a task that outlasted its timeout may take to end before its child process is killed (seconds).
OVERTIME = 5.0


def resident(pid: int) -> int:
    """A process's memory (bytes); 0 when it has ended, or on another system than Linux."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Executor(Protocol):
    """Runs jobs and reports on them through the callable it was made with, on its loop, in batches."""

    @property
    def slots(self) -> int:
        """How many jobs run at once; more may be submitted, but they wait."""

    @property
    def broken(self) -> asyncio.Future[None]:
        """Gets an exception when no job can ever run again (the application can't be imported any more)."""

    async def start(self, report: Callable[[Sequence[ExecutorEvent]], None], /) -> Manifest:
        """Be ready to run. Raises AppNotLoaded when the application can't be imported."""

    def submit(self, jobs: Sequence[RunRequest], /, *, ahead: int = 0) -> None:
        """Run jobs. ``ahead``: so many more than there are slots may wait where they are to run."""

    def recall(self) -> None:
        """Have jobs that have not begun given back (`Returned`), but for those that may run once only."""

    def cancel(self, keys: Sequence[int], /) -> None:
        """Have these jobs end: those that have not begun do not, those that run are told. Each is still reported on."""

    def children(self) -> Sequence[ChildReport]:
        """What each process that runs jobs does now; tasks by the names that their messages gave."""

    async def stop(self) -> None:
        """End at once. Jobs that still ran are given up without a report, and so are those that come later."""
