"""What happened, for whoever listens: logs, progress bars, tests. The worker and the brokers do not know them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from leveret.model import Cancelled, DeadLettered, Envelope, Outcome, Released, Retrying, Succeeded, log_fields
from leveret.visible import in_line, visible

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("leveret.worker")


class WorkerReady(msgspec.Struct, frozen=True):
    """The worker takes tasks from now on."""

    queues: list[str]


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


Event: TypeAlias = WorkerReady | TaskStarted | TaskFinished | TaskSettled | TaskBlocks | ChildReplaced | WorkerStopping
Listener: TypeAlias = "Callable[[Event], None]"


def write_log(event: Event) -> None:
    """The listener that every worker has: one line for what an operator must know, no arguments in it."""
    if isinstance(event, WorkerReady):
        log.info("waiting for tasks on %s", ", ".join(event.queues))
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
            visible(event.stack.rstrip()),
            extra=log_fields(event.envelope),
        )


def _log_outcome(event: TaskSettled) -> None:
    outcome = event.outcome
    if event.kept and isinstance(outcome, Succeeded) and not log.isEnabledFor(logging.DEBUG):
        return  # nearly all that there is to tell, and mostly nobody wants it
    # Anybody may have named them: neither a line of their own nor a terminal's command may come of it.
    name, id_ = in_line(event.envelope.task or "(default task)"), in_line(event.envelope.id)
    told = logging.LoggerAdapter(log, log_fields(event.envelope))
    if not event.kept:
        told.warning("%s %s: its delivery was lost before its outcome was recorded; it may run again", name, id_)
    elif event.at_most_once and isinstance(outcome, (Retrying, DeadLettered)):
        error = outcome.error if isinstance(outcome, Retrying) else outcome.reason
        told.error("%s %s: failed, and does not run again (acknowledge='before'): %s", name, id_, in_line(error))
    elif isinstance(outcome, Retrying):
        told.warning(
            "%s %s: attempt %d failed, next try in %.1f s: %s",
            name,
            id_,
            event.envelope.attempt,
            outcome.delay,
            in_line(outcome.error),
        )
    elif isinstance(outcome, DeadLettered):
        told.error("%s %s: dead: %s", name, id_, in_line(outcome.reason))
    elif isinstance(outcome, Cancelled):
        told.info("%s %s: %s", name, id_, in_line(outcome.reason))
    elif isinstance(outcome, Released):
        told.info("%s %s: handed back", name, id_)
    else:
        told.debug("%s %s: done", name, id_)
