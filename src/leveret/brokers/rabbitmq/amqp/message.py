"""What is published."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import msgspec

from leveret.brokers.rabbitmq.amqp.connections import Properties

#: AMQP's delivery mode of a message that outlives its server.
PERSISTENT = 2


class Message(msgspec.Struct, frozen=True):
    """What is published: to a queue, through the default exchange."""

    queue: str
    body: bytes
    properties: Properties
    #: The task queue it belongs to; ``queue`` may be that, or its dead-letter queue, or a step of its delays.
    home: str = ""
    #: Unix time before which it must not run; None: it goes to ``queue`` at once.
    due: float | None = None

    @property
    def id(self) -> str:
        return str(self.properties.message_id)


#: Makes a message fit the one frame that AMQP has for its headers; called with the largest frame (bytes; 0: no limit).
Fit: TypeAlias = Callable[[Message, int], Message]
