"""What is said to all workers on RabbitMQ: pause, cancel, questions."""

from __future__ import annotations

from leveret.brokers.rabbitmq.control.bus import (
    CANCELLING,
    MOST_QUEUES,
    PAUSING,
    ControlBus,
    Listening,
    Report,
    Signal,
    Tally,
)
from leveret.brokers.rabbitmq.control.cancel_log import (
    CancelLog,
)

__all__ = [
    "CANCELLING",
    "MOST_QUEUES",
    "PAUSING",
    "CancelLog",
    "ControlBus",
    "Listening",
    "Report",
    "Signal",
    "Tally",
]
