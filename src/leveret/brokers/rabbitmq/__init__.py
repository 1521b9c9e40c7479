"""The RabbitMQ broker, through aio-pika: RabbitMQ 3.10 to 4.3, no plugin, no second server."""

from __future__ import annotations

from leveret.brokers.rabbitmq.broker import RabbitMQBroker

__all__ = ["RabbitMQBroker"]
