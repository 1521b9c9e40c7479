"""What programs agree on through RabbitMQ alone: who has a key."""

from __future__ import annotations

from leveret.brokers.rabbitmq.coordination.claims import Claims

__all__ = ["Claims"]
