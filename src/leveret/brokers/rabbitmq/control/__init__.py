"""What operators and programs order on RabbitMQ, and what is said to all workers for it: pause, cancel, questions."""

from __future__ import annotations

from leveret.brokers.rabbitmq.control.bus import CANCELLING, PAUSING, ControlBus, Listening, Report, Signal
from leveret.brokers.rabbitmq.control.cancel_log import CancelLog, RabbitMQControl
from leveret.brokers.rabbitmq.control.dead_letters import RabbitMQDeadLetters
from leveret.brokers.rabbitmq.control.queues import RabbitMQQueues

__all__ = [
    "CANCELLING",
    "PAUSING",
    "CancelLog",
    "ControlBus",
    "Listening",
    "RabbitMQControl",
    "RabbitMQDeadLetters",
    "RabbitMQQueues",
    "Report",
    "Signal",
]
