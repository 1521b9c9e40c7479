"""AMQP: connections, confirms, frames, TLS. The only room that imports aio-pika, aiormq and pamqp."""

from __future__ import annotations

from leveret.brokers.rabbitmq.amqp.confirm_channel import SILENCE, ConfirmChannel, Limits, PublishCall
from leveret.brokers.rabbitmq.amqp.connections import Properties
from leveret.brokers.rabbitmq.amqp.frame_reader import Incoming, acks, nack
from leveret.brokers.rabbitmq.amqp.hosts import Hosts
from leveret.brokers.rabbitmq.amqp.message import PERSISTENT, Message, TaskProperties
from leveret.brokers.rabbitmq.amqp.sanitize import UNREADABLE, Content, content_of, field, marshal
from leveret.brokers.rabbitmq.amqp.splice import SplicedProperties, fields_of, spliced, text_field

__all__ = [
    "PERSISTENT",
    "SILENCE",
    "UNREADABLE",
    "ConfirmChannel",
    "Content",
    "Hosts",
    "Incoming",
    "Limits",
    "Message",
    "Properties",
    "PublishCall",
    "SplicedProperties",
    "TaskProperties",
    "acks",
    "content_of",
    "field",
    "fields_of",
    "marshal",
    "nack",
    "spliced",
    "text_field",
]
