"""Leveret: an asyncio work queue on RabbitMQ, or on one SQLite file.

The names are imported when they are first used: the command line, a program's ``--help`` and whoever needs one module
of it do not pay for asyncio and the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leveret.app import App
    from leveret.current import CurrentTask, NoCurrentTask, current_task
    from leveret.errors import (
        AppNotLoaded,
        BrokerBlocked,
        BrokerError,
        BrokerRefused,
        BrokerUnavailable,
        ConfigurationError,
        Dead,
        DuplicateTask,
        EnqueueError,
        EnqueueTimeout,
        InvalidArguments,
        LeaseLost,
        LeveretError,
        NotSerializable,
        QueueFull,
        QueueMismatch,
        QueueNotFound,
        Retry,
        StoreError,
        TaskTooLarge,
        UnknownTask,
        UnreadableBody,
    )
    from leveret.model import Queue
    from leveret.task import Handle, Task

__version__ = "0.1.0"

__all__ = [
    "App",
    "AppNotLoaded",
    "BrokerBlocked",
    "BrokerError",
    "BrokerRefused",
    "BrokerUnavailable",
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
    "NoCurrentTask",
    "NotSerializable",
    "Queue",
    "QueueFull",
    "QueueMismatch",
    "QueueNotFound",
    "Retry",
    "StoreError",
    "Task",
    "TaskTooLarge",
    "UnknownTask",
    "UnreadableBody",
    "current_task",
]

#: Where the names are that are not errors.
_HOMES = {
    "App": "leveret.app",
    "CurrentTask": "leveret.current",
    "NoCurrentTask": "leveret.current",
    "current_task": "leveret.current",
    "Queue": "leveret.model",
    "Handle": "leveret.task",
    "Task": "leveret.task",
}


# A type checker reads the imports above, and would take any name from a `__getattr__`.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOMES.get(name, "leveret.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
