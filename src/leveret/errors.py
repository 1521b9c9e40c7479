"""Every error that Leveret raises, under one base.

A message names the thing, the value and the remedy. A driver's own exceptions (sqlite3's, aio-pika's) are
translated into these at the driver's edge and kept as ``__cause__``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class LeveretError(Exception):
    """The base of every error that Leveret raises."""


class ConfigurationError(LeveretError):
    """What was asked for cannot work, whatever the broker's state: a bad URL, option or definition."""


class AppNotLoaded(ConfigurationError):
    """The application named by ``MODULE:APP`` cannot be imported. ``traceback``: of its own code, if that ran."""

    def __init__(self, message: str = "", traceback: str = "") -> None:
        super().__init__(*([message] if message else []))
        self.traceback = traceback


class QueueMismatch(ConfigurationError):
    """A queue of that name exists and cannot be used as it was asked for."""

    def __init__(self, queue: str, *, found: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
        super().__init__(
            f"queue {queue!r} exists and cannot be used: "
            f"found {_arguments(found)}, wanted {_arguments(wanted)}; {remedy}"
        )
        self.queue = queue
        self.found = dict(found)
        self.wanted = dict(wanted)


class UnknownTask(LeveretError):
    """No task of that name is registered."""


class InvalidArguments(LeveretError, TypeError):
    """The arguments do not fit the task's signature."""


class NotSerializable(InvalidArguments):
    """An argument is not JSON, and its annotation does not carry it either."""


class UnreadableBody(LeveretError, ValueError):
    """A message's body is not what its task can read."""


class TaskTooLarge(LeveretError, ValueError):
    """The encoded arguments are over the application's ``max_message_size``."""


class BrokerError(LeveretError):
    """The broker did not do what it was asked."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be reached or used now; trying again later may succeed."""


class BrokerRefused(BrokerError):
    """The broker refuses this client (credentials, virtual host, permissions, certificate), or is not to be trusted."""


class StoreError(BrokerError):
    """The SQLite file cannot be used: it is not Leveret's, damaged, read-only, gone, of two names or on a full disk."""


class EnqueueError(BrokerError):
    """Some tasks were not confirmed as stored. ``ids`` names them."""

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class QueueNotFound(EnqueueError):
    """The queue does not exist and this program may not create it. The tasks in ``ids`` were not stored."""


class LimitNotFound(BrokerError):
    """There is no limit of that name."""


class ScheduleNotFound(BrokerError):
    """The broker has no schedule of that name."""


class QueueInUse(BrokerError):
    """The queue has consumers, or tasks that run, so it is not purged or deleted unless that is forced."""


class PeekRefused(BrokerError):
    """The broker cannot show what waits in a queue without moving or counting it, so it does not look."""


class QueueFull(EnqueueError):
    """The queue holds its ``max_length``. The tasks in ``ids`` were not stored."""


class QueueUnavailable(EnqueueError, BrokerUnavailable):
    """The queue refused tasks for all of the time, and is not known to be full. Those in ``ids`` were not stored."""


class DuplicateTask(EnqueueError):
    """Tasks with these ids, or with their unique keys, are there already, or were given twice. Nothing was stored.

    ``ids``: of the tasks that were refused. ``existing``: for one whose unique key is taken, the id of the task that
    is there.
    """

    def __init__(self, ids: Sequence[str], existing: Mapping[str, str] | None = None) -> None:
        self.existing = dict(existing or {})
        super().__init__(_why_taken(ids) if not self.existing else _why_not_unique(self.existing), ids)


def _why_taken(ids: Sequence[str]) -> str:
    return (
        f"task id taken, or given twice: {', '.join(map(repr, ids[:5]))}"
        + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        + "; nothing was stored. If it is the same task, there is nothing to do; else choose another id. "
        "An id is free again when its task has succeeded or its dead letter was dropped"
    )


def _why_not_unique(existing: Mapping[str, str]) -> str:
    holders = list(dict.fromkeys(existing.values()))
    return (
        f"a task with the same unique key has not ended: {', '.join(map(repr, holders[:5]))}"
        + (f" and {len(holders) - 5} more" if len(holders) > 5 else "")
        + "; nothing was stored. on_conflict='ignore' gives its handle instead"
    )


class EnqueueTimeout(EnqueueError, TimeoutError):
    """The broker did not confirm in time. The tasks in ``ids`` may or may not be stored."""


class BrokerBlocked(EnqueueTimeout):
    """The broker accepts no publishes now (a memory or disk alarm)."""


class LeaseLost(BrokerError):
    """Deliveries are no longer this consumer's: its connection was lost. Nothing was changed for them."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(
            f"{len(ids)} deliveries are no longer this consumer's and may run again: {', '.join(map(repr, ids[:5]))}"
            + (" and more" if len(ids) > 5 else "")
        )
        self.ids = tuple(ids)


class ResultError(LeveretError):
    """A task's result cannot be had."""


class ResultTimeout(ResultError, TimeoutError):
    """The task had not ended in time. It goes on; ask again."""


class TaskFailed(ResultError):
    """The task is dead: it failed for good, or could not run. ``reason``, ``traceback``: as the worker told them."""

    def __init__(self, id_: str, task: str | None, reason: str, traceback: str = "") -> None:
        super().__init__(f"task {task or '(default task)'} {id_} is dead: {reason}")
        self.id = id_
        self.task = task
        self.reason = reason
        self.traceback = traceback
        if traceback:
            self.add_note(f"On the worker:\n{traceback.rstrip()}")


class TaskCancelled(ResultError):
    """The task was cancelled; the message says whether it had begun."""


class TaskNotFound(ResultError):
    """The broker knows nothing of a task with that id."""


class NoResult(ResultError):
    """The task succeeded, and its result was not kept: it was too large, or nothing that JSON can carry."""


class TimedOut(LeveretError, TimeoutError):
    """An attempt ran longer than its task's ``timeout``. It is a failure like others: the retry policy decides."""


def _arguments(arguments: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}={value!r}" for name, value in arguments.items()) + "}"
