"""The contract of a broker: what it does for Leveret."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import msgspec

from leveret.errors import DuplicateTask, LimitNotFound, QueueInUse, ScheduleNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.brokers.feeds import Feed
    from leveret.brokers.inbox import Arrival
    from leveret.model import (
        Change,
        DeadLetter,
        Describe,
        Envelope,
        KeyHolder,
        LimitRequest,
        LimitUse,
        Queue,
        QueueStats,
        Removed,
        ScheduleRequest,
        ScheduleRow,
        Settlement,
        Status,
        WorkerReport,
    )

#: What becomes of a task whose unique key is taken: the one that is there stands for it; the enqueue is refused; the
#: one that is there stands for it, and gets its arguments.
OnConflict: TypeAlias = Literal["ignore", "raise", "replace"]
#: Where a task waits: it may be taken now, or is not due yet.
WaitingState: TypeAlias = Literal["ready", "delayed"]
#: How long `publish` may take before it raises (seconds).
DEFAULT_TIMEOUT = 30.0

#: A dead letter, as it is to be kept; None: not at all.
Select: TypeAlias = "Callable[[DeadLetter], DeadLetter | None]"


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What one broker can do and another cannot. It is known before anything is connected, and never changes."""

    #: Other processes reach the same queues by the same URL.
    shared: bool
    #: `Broker.publish_blocking` works.
    blocking: bool = False


class HoldLimit(msgspec.Struct, frozen=True):
    """A broker takes a delivery back that is not settled in time, though its consumer lives."""

    #: As far as is known: the server may be set otherwise (seconds).
    seconds: float
    #: Who does so, and what to set there.
    remedy: str


class Consumer(Protocol):
    """What arrives, until its context is left. A broken connection is mended behind it.

    There is one iteration, however often it is begun: what one reader was given no other gets.
    """

    @property
    def hold_limit(self) -> HoldLimit | None:
        """How long a delivery may be held; None: as long as the consumer lives."""

    def __aiter__(self) -> AsyncIterator[Arrival]: ...

    @property
    def paused(self) -> frozenset[str]:
        """Which of its queues are paused: nothing is taken from them. `Paused` arrives when this has changed."""

    @property
    def connected(self) -> bool:
        """Whether tasks can come now; False while a lost connection is mended."""

    @property
    def losses(self) -> int:
        """How often its connection was lost since it began."""

    @property
    def adjusts_credit(self) -> bool:
        """Whether `set_credit` may be called. Otherwise it keeps the credit that it begins with."""

    async def set_credit(self, credit: int, /) -> None:
        """Hold at most so many unsettled deliveries of each queue from now on.

        What it holds in excess stays, and until that is settled or handed back it gets nothing new.
        """

    async def stop(self) -> None:
        """Take no more. What was delivered can still be settled, and cancellations arrive, until the context is left.

        Deliveries that were on their way may arrive once more, to be handed back.
        """


class Queues(Protocol):
    """What is in a broker's queues, and what an operator does to them."""

    async def stats(self, queues: Sequence[str] = (), /) -> Sequence[QueueStats]:
        """Counts of the queues named, and of all the others that the broker can list by itself."""

    async def ready(self, queues: Sequence[str], /) -> int:
        """How many tasks wait in these queues, all together, cheaply enough to ask every second.

        It may be a moment old, and a broker need not count more than some thousands of a queue.
        """

    async def peek(self, queue: str, state: WaitingState, /, *, limit: int) -> Sequence[Envelope]:
        """Tasks that wait in a queue, which stay where they are: those that are taken next, or are due next, first.

        At most ``limit``; a broker may show fewer. Raises QueueNotFound; PeekRefused where a look would move them, or
        count as a return.
        """

    async def pause(self, queue: str, /) -> None:
        """Have all workers start nothing more of a queue, those too that come later, until it is resumed.

        Durable when it returns. Tasks can still be enqueued. Raises QueueNotFound.
        """

    async def resume(self, queue: str, /) -> None:
        """End the pause of a queue; one that is not paused stays so. Raises QueueNotFound."""

    async def purge(self, queue: str, /, *, force: bool = False) -> Removed:
        """Delete all tasks of a queue that are ready or delayed; they never run. Dead letters stay.

        Raises QueueNotFound; QueueInUse while it has consumers or running tasks, unless ``force``: what runs is then
        finished.
        """

    async def delete(self, queue: str, /, *, force: bool = False) -> Removed:
        """Purge a queue, and delete its dead letters, its pause and itself. Raises as `purge` does.

        With ``force`` a queue that is in use stays, or is made again by its consumers.
        """


class Statuses(Protocol):
    """What becomes of tasks: told by those who have them, and read by those who wait for them."""

    async def notify(self, updates: Sequence[Status], /) -> None:
        """Let those who follow know, soon. What a crash loses of it is told by the next update."""

    async def read(self, ids: Sequence[str], /) -> Sequence[Status]:
        """What is known of these tasks now; nothing of those that are not known, or not any more."""

    def follow(self, ids: Sequence[str], /) -> AbstractAsyncContextManager[Feed]:
        """News of these tasks: what is known now, then each change. A broken connection is mended behind it."""

    async def recent(self, limit: int, /) -> Sequence[Status]:
        """The tasks that changed last, the newest first: as many of the last hour's as are found without much reading.

        For an overview; of each what its latest updates tell, which may be less than `read` knows.
        """

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]:
        """Every update of every task whose results are kept, from now on; `leveret.model.newer` adds them up.

        Whoever is slow to read gets several updates of a task as one. A broken connection is mended behind it.
        """


class DeadLetters(Protocol):
    """The tasks that failed for good, until somebody decides about them."""

    async def read(self, queue: str, /, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        """The oldest dead letters of a queue; they stay where they are. ``limit`` is how many are looked through.

        ``select``: called with each as it is read, perhaps more than once, and with some beyond the limit. What it
        returns is kept in its place, and nothing for None; so what is too large for all of them at once is not held.
        (RabbitMQ before 4.3 counts what is handed back, so there all that is looked through is held meanwhile.)
        """

    async def retry(self, queue: str, ids: Sequence[str], /) -> Sequence[str]:
        """Put dead letters back into their queue as first attempts, durably before they leave here; those found.

        Raises QueueNotFound.
        """

    async def drop(self, queue: str, ids: Sequence[str], /) -> Sequence[str]:
        """Delete dead letters for good; those found. Raises QueueNotFound."""


class Schedules(Protocol):
    """Schedules, each in a row, and what they store when they fall due."""

    async def read(self) -> Sequence[ScheduleRow]:
        """All of them, by name."""

    async def ask(self, request: ScheduleRequest, /) -> Change:
        """Change schedules, durably when it returns. Raises ScheduleNotFound."""

    def keep(self) -> AbstractAsyncContextManager[ScheduleKeeper]:
        """Have what falls due stored, until the context is left. Any number of programs may keep them at once."""


class ScheduleKeeper(Protocol):
    """Stores the tasks of schedules that fall due."""

    async def due(self) -> tuple[Sequence[ScheduleRow], float | None]:
        """The schedules that are due now, and in how many seconds the next one is; None: none is known to be.

        Where one program at a time keeps them, it waits until this one does.
        """

    async def advance(self, name: str, unfinished: Mapping[str, bool], /) -> Change:
        """Store the tasks of a schedule that are due, and move it on: both, or neither.

        ``unfinished``: see `leveret.model.advance`. Another program may have done so already; then nothing is changed.
        Raises QueueFull, QueueNotFound.
        """

    async def wait(self, seconds: float, /) -> None:
        """Until so much time has passed, at most: schedules may have changed."""


class Limits(Protocol):
    """How many tasks may be under way, and how many may start in a time.

    A task whose headers name limits, or that is in a queue which has one, waits until all of them let it go. Tasks of
    other limits and keys pass it, and those for whom others wait take turns. Once admitted it has a permit of each
    until it is settled: but for `Released`, and for a worker that dies, which leave it its permit.
    """

    async def read(self) -> Sequence[LimitUse]:
        """All limits and what they do, by name."""

    async def ask(self, request: LimitRequest, /) -> None:
        """Change limits, durably when it returns. In force within a second. Raises LimitNotFound."""

    def keep(self) -> AbstractAsyncContextManager[None]:
        """Have tasks that wait admitted, until the context is left; where workers decide that. Any number may."""


class Control(Protocol):
    """What is asked of workers."""

    async def cancel(self, id_: str, /) -> Status | None:
        """Have a task not run, or end; what is known of it then. "cancelled": it never runs. Not final: it runs, or it
        waits where it cannot be reached, and whoever has it is told. None: nothing is known of it; told all the same.
        """

    async def workers(self) -> Sequence[WorkerReport]:
        """What the living workers do now. They are asked; one that does not answer within a second is left out."""


class UniqueKeys(Protocol):
    """Which unique keys are taken. `Broker.publish` takes them, and the end of a task frees them."""

    async def holders(self, limit: int, /) -> Sequence[KeyHolder]:
        """The keys that are taken, in their order, at most so many."""

    async def free(self, keys: Sequence[tuple[str, str]], /) -> None:
        """Free keys, each given with the id of the task that has it, if that still has it. Raises BrokerError."""

    async def release(self, key: str, /) -> str | None:
        """Free a key though its task has not ended, which keeps running or waiting; its id. None: nobody had it."""


class Broker(Protocol):
    """A place where tasks are kept. Every method, its facets' too, raises BrokerError's subclasses and nothing of its
    driver's.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What it can do that not every broker can."""

    @property
    def queues(self) -> Queues:
        """Counts, pauses and deletes."""

    @property
    def statuses(self) -> Statuses:
        """Tells and reads what becomes of tasks."""

    @property
    def dead_letters(self) -> DeadLetters:
        """Reads dead letters, and decides about them."""

    @property
    def schedules(self) -> Schedules:
        """Keeps schedules."""

    @property
    def limits(self) -> Limits:
        """Says how many tasks may be under way."""

    @property
    def control(self) -> Control:
        """Cancels tasks, and asks what workers do."""

    @property
    def unique(self) -> UniqueKeys:
        """Which unique keys are taken."""

    async def declare(self, queues: Sequence[Queue], /) -> None:
        """Make or adopt the queues. Raises QueueMismatch or QueueNotFound; then none of these was changed."""

    async def publish(
        self, envelopes: Sequence[Envelope], /, *, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        """Store the tasks. Returned means durable; raises EnqueueError or BrokerUnavailable within its timeout.

        At most one task with a unique key (`leveret.model.unique_key`) is there that has not ended, and one with an id
        of its own (`leveret.model.id_token`): until it has succeeded, was cancelled or deleted, or its dead letter was
        dropped, and for as long as `leveret.model.id_for` says. "raise": where one is, DuplicateTask is raised, and
        nothing of the call is stored. "ignore": the others are stored; returned are the ids of those that were not,
        each with the id of the one that is there. None: all were stored. "replace": the same, and the one that is
        there, if it has the same unique key and `is_replaceable`, is handed out as `leveret.model.replaced` says, from
        the next time on. One with a `waiting_key` has no key as soon as it is handed out. An own id that the call has
        twice is DuplicateTask in any case.
        """

    def publish_blocking(
        self, envelopes: Sequence[Envelope], /, *, notify: bool, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        """`publish` in the calling thread, which runs no event loop: any thread, when the queues are declared.

        ``notify``: let those who follow know. Only where `Capabilities.blocking` says so; elsewhere it raises
        NotImplementedError.
        """

    def consume(
        self,
        queues: Sequence[Queue],
        /,
        *,
        credit: int | None,
        most: int | None = None,
        describe: Describe | None = None,
    ) -> AbstractAsyncContextManager[Consumer]:
        """Take from the queues, at most ``credit`` unsettled deliveries of each (None: no limit).

        What is unsettled when the context is left goes back to its queue. ``most``: the credit of a consumer that
        cannot change it later (None: the same). ``describe``: called when somebody asks for
        `Control.workers`, from then until the context is left; without it this one is not among them.
        """

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = (), /) -> None:
        """Record outcomes. Raises LeaseLost for deliveries that are no longer the caller's; the others are done.

        ``updates``: of tasks whose results are kept; durable before their deliveries are gone. So is what
        `leveret.model.Succeeded.follow_ups` says, in whatever queue: one that is missing is made, and `max_length`
        is no limit where the broker can have it so. What has the id of a task that is there is that task.
        """

    def abandon(self) -> None:
        """Let go of what is open without a loop to close it on: the loop that it was opened on has ended."""

    async def close(self) -> None:
        """Give the connections back. What was published is safe; what was delivered and not settled goes back."""


def duplicates(existing: Mapping[str, str]) -> DuplicateTask:
    """Why tasks are refused, each given with the id of the one that is there: its own, where that is what is taken."""
    return DuplicateTask(list(existing), {id_: holder for id_, holder in existing.items() if holder != id_})


def in_use(queue: str, *, consumers: int, running: int = 0) -> QueueInUse:
    """Why a queue is not purged or deleted."""
    return QueueInUse(
        f"queue {queue!r} is in use: {consumers} consumers, {running} running tasks; stop its workers first, or say "
        "--force (force=True)"
    )


def no_schedule(request: ScheduleRequest) -> ScheduleNotFound:
    """Why a request that names a schedule does nothing."""
    name = getattr(request, "name", "")
    return ScheduleNotFound(f"schedule {name!r} does not exist; `leveret schedules` shows those that do")


def no_limit(request: LimitRequest) -> LimitNotFound:
    """Why a request that names a limit does nothing."""
    name = getattr(request, "name", "")
    return LimitNotFound(f"limit {name!r} does not exist; `leveret limits list` shows those that do")
