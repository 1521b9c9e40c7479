"""The way to the stream when its connection goes away under it; with a publisher that has none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from leveret.brokers.rabbitmq.events import Events
from leveret.model import Envelope
from leveret.status import enqueued

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.publisher import Publisher

UPDATE = enqueued(Envelope("1", "work", "say", b"{}"), 1.0)


class Dropped:
    """aiormq cancels what waits on a connection that it gives up."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def connection(self) -> None:
        self.asked.set()
        raise asyncio.CancelledError


async def test_a_connection_that_is_given_up_does_not_cancel_who_records() -> None:
    events = Events(["amqp://localhost"], cast("Publisher", Dropped()), keep=60.0, timeout=1.0)
    await asyncio.wait_for(events.record([UPDATE]), 10)
    await events.close()
