"""Queues on RabbitMQ: declare, encode, publish, count, look at dead letters."""

from __future__ import annotations

from leveret.brokers.rabbitmq.queues.codec import (
    buried,
    dead_letter_id,
    postponed,
    received,
    retry_message,
    revived_message,
    routed,
    to_dead_letter,
    to_message,
)
from leveret.brokers.rabbitmq.queues.dead import Fetched
from leveret.brokers.rabbitmq.queues.declarations import Declarations, DelayedPublisher
from leveret.brokers.rabbitmq.queues.declare import (
    OnceLogger,
    consumer_arguments,
    declare,
    delete_queue,
    has_single_active_consumer,
    is_paused,
    make_control_exchange,
    make_stream,
    mark_paused,
    message_count,
    pause_marks,
    purge_queue,
    require_queue,
    unmark_paused,
    warn_of_priorities,
)
from leveret.brokers.rabbitmq.queues.publisher import Publisher
from leveret.brokers.rabbitmq.queues.requests import Requester
from leveret.brokers.rabbitmq.queues.topology import (
    CONTROL_EXCHANGE,
    DELAY_STEPS,
    UNAPPLIED,
    Declaration,
    dead_queue,
    delay_queue,
    delay_step,
    pause_marker,
)

__all__ = [
    "CONTROL_EXCHANGE",
    "DELAY_STEPS",
    "UNAPPLIED",
    "Declaration",
    "Declarations",
    "DelayedPublisher",
    "Fetched",
    "OnceLogger",
    "Publisher",
    "Requester",
    "buried",
    "consumer_arguments",
    "dead_letter_id",
    "dead_queue",
    "declare",
    "delay_queue",
    "delay_step",
    "delete_queue",
    "has_single_active_consumer",
    "is_paused",
    "make_control_exchange",
    "make_stream",
    "mark_paused",
    "message_count",
    "pause_marker",
    "pause_marks",
    "postponed",
    "purge_queue",
    "received",
    "require_queue",
    "retry_message",
    "revived_message",
    "routed",
    "to_dead_letter",
    "to_message",
    "unmark_paused",
    "warn_of_priorities",
]
