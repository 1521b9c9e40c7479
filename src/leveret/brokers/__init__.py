"""Where tasks are kept: the contract of a broker, and how a URL becomes one."""

from __future__ import annotations

from leveret.brokers.backoff import backoff
from leveret.brokers.base import (
    DEFAULT_TIMEOUT,
    Broker,
    Capabilities,
    Consumer,
    Control,
    DeadLetters,
    HoldLimit,
    Limits,
    OnConflict,
    Queues,
    ScheduleKeeper,
    Schedules,
    Select,
    Statuses,
    UniqueKeys,
    WaitingState,
)
from leveret.brokers.deadlines import Deadlines
from leveret.brokers.feeds import Feed, Following, Watch
from leveret.brokers.flights import Flights
from leveret.brokers.inbox import Arrival, CancelRequests, Deliveries, Inbox, Paused
from leveret.brokers.queue_names import QueueNames
from leveret.brokers.registry import Opener, connect, schemes
from leveret.brokers.urls import absolute, censor, file_of, location

__all__ = [
    "DEFAULT_TIMEOUT",
    "Arrival",
    "Broker",
    "CancelRequests",
    "Capabilities",
    "Consumer",
    "Control",
    "DeadLetters",
    "Deadlines",
    "Deliveries",
    "Feed",
    "Flights",
    "Following",
    "HoldLimit",
    "Inbox",
    "Limits",
    "OnConflict",
    "Opener",
    "Paused",
    "QueueNames",
    "Queues",
    "ScheduleKeeper",
    "Schedules",
    "Select",
    "Statuses",
    "UniqueKeys",
    "WaitingState",
    "Watch",
    "absolute",
    "backoff",
    "censor",
    "connect",
    "file_of",
    "location",
    "schemes",
]
