"""Leveret: an asyncio work queue on RabbitMQ, or on one SQLite file."""

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
