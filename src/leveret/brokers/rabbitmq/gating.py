"""What a consumer does with a task that has limits: it goes to wait, unless it was admitted. See docs/adr/0042."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeAlias

from leveret.brokers.rabbitmq.queues import RabbitMQDelivery, regated
from leveret.errors import BrokerError
from leveret.model import is_limited

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.brokers.rabbitmq.limits import RabbitMQLimits
    from leveret.model import Delivery, Queue

log = logging.getLogger("leveret.rabbitmq.limits")

#: Stores a copy of a delivery, and settles it; False when that is not possible now.
Store: TypeAlias = "Callable[[Delivery, Message], Coroutine[object, object, bool]]"
#: What could not go, or not be asked for, is tried again after so long (seconds).
_AGAIN = 1.0


class Gating:
    """Those of one consumer's tasks that may not run before they are admitted."""

    def __init__(self, queues: Sequence[Queue], limits: RabbitMQLimits, store: Store) -> None:
        self._limited = frozenset(queue.name for queue in queues if queue.is_limited)
        self._limits = limits
        self._store = store

    def stops(self, delivery: Delivery) -> bool:
        """Whether `pass_on` is to decide about it: it has no permit, or may have one that has ended."""
        envelope = delivery.envelope
        if not isinstance(delivery, RabbitMQDelivery) or delivery.defect:
            return False
        if delivery.permit:
            return delivery.returns > 0
        if envelope.queue in self._limited:
            return True
        return bool(envelope.headers) and is_limited(envelope.headers)

    async def pass_on(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Move those to where they wait that have no permit; the others may run."""
        stopped = [delivery for delivery in deliveries if isinstance(delivery, RabbitMQDelivery)]
        alive = await self._alive([delivery.permit for delivery in stopped if delivery.permit])
        moving = [delivery for delivery in stopped if delivery.permit not in alive]
        await asyncio.gather(*map(self._move, moving))
        return [delivery for delivery in stopped if delivery.permit in alive]

    async def _alive(self, permits: Sequence[str]) -> frozenset[str]:
        """Those that were not given back: whoever had the task may have died between that and its end."""
        while permits:
            try:
                return frozenset(await self._limits.alive(permits))
            except BrokerError as error:
                log.warning("%d tasks came back, and wait to know whether they may run: %s", len(permits), error)
            await asyncio.sleep(_AGAIN)
        return frozenset()

    async def _move(self, delivery: RabbitMQDelivery) -> None:
        while delivery.lease.held:
            try:
                await self._limits.serve([delivery.envelope.queue])
                if await self._store(delivery, regated(delivery)):
                    return
            except BrokerError as error:
                log.warning("task %s cannot wait for its limits yet: %s", delivery.envelope.id, error)
            await asyncio.sleep(_AGAIN)
