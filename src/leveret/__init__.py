"""Leveret: an asyncio work queue on RabbitMQ, or on one SQLite file.

The names are imported when they are first used: the command line, a program's ``--help`` and whoever needs one module
of it do not pay for asyncio and the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from leveret.client import App, Chain, ChainHandle, Handle, Limit, Step, Task, as_finished, by, gather_results
    from leveret.errors import (
        AppNotLoaded,
        BrokerBlocked,
        BrokerError,
        BrokerRefused,
        BrokerUnavailable,
        ConfigurationError,
        DuplicateTask,
        EnqueueError,
        EnqueueTimeout,
        InvalidArguments,
        LeaseLost,
        LeveretError,
        LimitNotFound,
        NoResult,
        NotSerializable,
        PeekRefused,
        QueueFull,
        QueueInUse,
        QueueMismatch,
        QueueNotFound,
        QueueUnavailable,
        ResultError,
        ResultTimeout,
        ScheduleNotFound,
        StoreError,
        TaskCancelled,
        TaskFailed,
        TaskNotFound,
        TaskTooLarge,
        UnknownTask,
        UnreadableBody,
    )
    from leveret.model import (
        CurrentTask,
        Dead,
        Limited,
        NoCurrentTask,
        Progress,
        Queue,
        Rate,
        Retry,
        Status,
        cron,
        current_task,
        every,
    )

__version__ = "0.1.0"

__all__ = [
    "App",
    "AppNotLoaded",
    "BrokerBlocked",
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
    "Chain",
    "ChainHandle",
    "ConfigurationError",
    "CurrentTask",
    "Dead",
    "DuplicateTask",
    "EnqueueError",
    "EnqueueTimeout",
    "Handle",
    "InvalidArguments",
    "LeaseLost",
    "LeveretError",
    "Limit",
    "LimitNotFound",
    "Limited",
    "NoCurrentTask",
    "NoResult",
    "NotSerializable",
    "PeekRefused",
    "Progress",
    "Queue",
    "QueueFull",
    "QueueInUse",
    "QueueMismatch",
    "QueueNotFound",
    "QueueUnavailable",
    "Rate",
    "ResultError",
    "ResultTimeout",
    "Retry",
    "ScheduleNotFound",
    "Status",
    "Step",
    "StoreError",
    "Task",
    "TaskCancelled",
    "TaskFailed",
    "TaskNotFound",
    "TaskTooLarge",
    "UnknownTask",
    "UnreadableBody",
    "as_finished",
    "by",
    "cron",
    "current_task",
    "every",
    "gather_results",
]

#: Where the names are that are not errors.
_HOMES = {
    "App": "leveret.client",
    "Chain": "leveret.client",
    "ChainHandle": "leveret.client",
    "Handle": "leveret.client",
    "Limit": "leveret.client",
    "Step": "leveret.client",
    "Task": "leveret.client",
    "as_finished": "leveret.client",
    "by": "leveret.client",
    "gather_results": "leveret.client",
    "CurrentTask": "leveret.model",
    "Dead": "leveret.model",
    "Limited": "leveret.model",
    "NoCurrentTask": "leveret.model",
    "Progress": "leveret.model",
    "Queue": "leveret.model",
    "Rate": "leveret.model",
    "Retry": "leveret.model",
    "Status": "leveret.model",
    "cron": "leveret.model",
    "current_task": "leveret.model",
    "every": "leveret.model",
}


# A type checker reads the imports above, and would take any name from a `__getattr__`.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_HOMES.get(name, "leveret.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """What is meant for others; not what this module itself needs."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
