"""What happened, for whoever listens: logs, progress bars, tests. The worker and the brokers do not know them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from leveret.model import Cancelled, DeadLettered, Envelope, Outcome, PutOff, Released, Retrying, log_fields
from leveret.model.printable import in_line, printable

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("leveret.worker")


class WorkerReady(msgspec.Struct, frozen=True):
    """The worker takes tasks from now on."""

    queues: list[str]
    #: What the broker's URL means: a file, or a server without its password. Empty: one that the program gave.
    broker: str = ""


class TaskStarted(msgspec.Struct, frozen=True):
    """A task is about to be called."""

    envelope: Envelope


class TaskFinished(msgspec.Struct, frozen=True):
    """A run has ended, and its outcome is on its way to the broker. Not told of a task that is dead before it runs."""

    envelope: Envelope
    outcome: Outcome


class TaskSettled(msgspec.Struct, frozen=True):
    """The outcome is recorded.

    ``kept=False``: the lease was lost first, and the task may run again. ``at_most_once``: the task was acknowledged
    before it ran, so that nothing is recorded and a failed one does not run again.
    """

    envelope: Envelope
    outcome: Outcome
    kept: bool = True
    at_most_once: bool = False
    #: How long it ran; None: it did not, or its process died.
    seconds: float | None = None


class WorkerStopping(msgspec.Struct, frozen=True):
    """The worker takes no more; ``running`` tasks may finish within ``grace`` seconds."""

    running: int
    grace: float


class TaskBlocks(msgspec.Struct, frozen=True):
    """A task keeps the event loop of its child from turning: no other ``async def`` task there gets on meanwhile."""

    envelope: Envelope
    #: So far (seconds).
    seconds: float
    stack: str


class ChildReplaced(msgspec.Struct, frozen=True):
    """A child process ended, or takes no more tasks; a fresh one is started."""

    pid: int
    #: died: crashed or was killed from outside. overran: killed, or left behind, for a task that outlasts its timeout.
    #: blocked: its event loop does not turn. recycled: it has run, or holds, as much as it may.
    #: unfit: a task has left it in a state in which the others fail.
    reason: Literal["died", "overran", "blocked", "recycled", "unfit"]


class ScheduleAdvanced(msgspec.Struct, frozen=True):
    """A schedule fell due, and this worker stored its tasks, or none. Of all workers one is told."""

    #: Its name.
    schedule: str
    #: The application in whose code it is; None: it is data.
    origin: str | None
    #: For each task that was stored, how much later than it was due (seconds).
    lateness: list[float]
    #: How many instants passed without a task: no worker was there, or the task before was not finished.
    missed: int = 0
    skipped: int = 0


Event: TypeAlias = (
    WorkerReady
    | TaskStarted
    | TaskFinished
    | TaskSettled
    | TaskBlocks
    | ChildReplaced
    | ScheduleAdvanced
    | WorkerStopping
)
Listener: TypeAlias = "Callable[[Event], None]"


def write(
    log: logging.Logger,
    level: int,
    message: str,
    *args: object,
    envelope: Envelope | None = None,
    traceback: str = "",
) -> None:
    """Log it, with the fields of a task and with a traceback that came as text, from another process."""
    if not log.isEnabledFor(level):
        return
    extra = None if envelope is None else log_fields(envelope)
    record = log.makeRecord(log.name, level, __file__, 0, message, args, None, extra=extra)
    # Where formatters keep an exception that they have formatted: all of them show it.
    record.exc_text = printable(traceback.rstrip()) or None
    log.handle(record)


def write_log(event: Event) -> None:
    """The listener that every worker has: one line for what an operator must know, no arguments in it."""
    if isinstance(event, WorkerReady):
        place = f" in {in_line(event.broker)}" if event.broker else ""
        log.info("waiting for tasks on %s%s", in_line(", ".join(event.queues)), place)
    elif isinstance(event, WorkerStopping):
        log.info("stopping: %d tasks may finish within %g s", event.running, event.grace)
    elif isinstance(event, TaskSettled):
        _log_outcome(event)
    elif isinstance(event, TaskBlocks):
        log.warning(
            "%s %s: blocks the event loop, for %.1f s so far; await instead, or make it a plain def. It is at\n%s",
            in_line(event.envelope.task or "(default task)"),
            in_line(event.envelope.id),
            event.seconds,
            printable(event.stack.rstrip()),
            extra=log_fields(event.envelope),
        )


def _log_outcome(event: TaskSettled) -> None:
    outcome, envelope = event.outcome, event.envelope
    # Anybody may have named them: neither a line of their own nor a terminal's command may come of it.
    who = f"{in_line(envelope.task or '(default task)')} {in_line(envelope.id)}"
    after = "" if event.seconds is None else f" after {_length(event.seconds)}"
    traceback = outcome.traceback if isinstance(outcome, (Retrying, DeadLettered)) else ""
    level, text = _line(event, after)
    write(log, level, "%s: %s", who, text, envelope=envelope, traceback=traceback if event.kept else "")


def _line(event: TaskSettled, after: str) -> tuple[int, str]:
    """How loud, and what is said of the outcome."""
    outcome = event.outcome
    if not event.kept:
        return logging.WARNING, "its delivery was lost before its outcome was recorded; it may run again"
    if event.at_most_once and isinstance(outcome, (Retrying, DeadLettered)):
        error = in_line(outcome.error if isinstance(outcome, Retrying) else outcome.reason)
        return logging.ERROR, f"failed{after}, and does not run again (acknowledge='before'): {error}"
    if isinstance(outcome, Retrying):
        attempt = f"attempt {event.envelope.attempt} failed{after}"
        return logging.WARNING, f"{attempt}, next try in {outcome.delay:.1f} s: {in_line(outcome.error)}"
    if isinstance(outcome, DeadLettered):
        return logging.ERROR, f"dead{after}: {in_line(outcome.reason)}"
    if isinstance(outcome, Cancelled):
        return logging.INFO, f"{in_line(outcome.reason)}{after and f', {after.strip()}'}"
    if isinstance(outcome, Released):
        return logging.INFO, f"handed back{after}"
    if isinstance(outcome, PutOff):
        of = f" for {in_line(outcome.key)}" if outcome.key else ""
        return logging.INFO, f"put off{after}: limit {in_line(outcome.limit)!r} rests{of}, for {outcome.delay:.1f} s"
    return logging.INFO, f"done{after.replace(' after ', ' in ')}"


def _length(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:.1f} s"
