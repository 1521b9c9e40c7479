"""Tasks whose arguments later calls may have replaced: the claims log is asked before they are handed on."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeAlias

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.queues import changed
from leveret.errors import BrokerError
from leveret.model import is_replaceable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from leveret.model import Delivery, Envelope

log = logging.getLogger("leveret.rabbitmq")

#: Gives tasks as they are to run now, or, with a later ``due``, to wait. Raises BrokerError or TimeoutError.
Begin: TypeAlias = "Callable[[Sequence[Envelope]], Coroutine[object, object, Sequence[Envelope]]]"


class Replacing:
    """Those of one consumer. ``hand_on``: called with deliveries that may run, or are to wait."""

    def __init__(self, begin: Begin, hand_on: Callable[[Sequence[Delivery]], None]) -> None:
        self._begin = begin
        self._hand_on = hand_on
        self._asking: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def without(self, deliveries: Sequence[Delivery]) -> Sequence[Delivery]:
        """Those that are handed on at once; the others are when the log has answered."""
        asked = [one for one in deliveries if one.envelope.headers and is_replaceable(one.envelope.headers)]
        if not asked:
            return deliveries
        if not self._is_closed:
            task = asyncio.get_running_loop().create_task(self._ask(asked))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return [one for one in deliveries if one not in asked]

    async def _ask(self, deliveries: Sequence[Delivery]) -> None:
        for pause in backoff():
            deliveries = [one for one in deliveries if one.lease.held]
            try:
                found = await self._begin([one.envelope for one in deliveries])
            except (BrokerError, TimeoutError) as error:
                log.warning(
                    "%d tasks do not begin, as it is not known whether later calls replaced their arguments: %s",
                    len(deliveries),
                    str(error) or "no answer",
                )
                await asyncio.sleep(pause)
            else:
                break
        pairs = zip(deliveries, found, strict=True)
        self._hand_on([one if one.envelope is envelope else changed(one, envelope) for one, envelope in pairs])

    async def close(self) -> None:
        """What comes yet, as limits let it go, does not begin here any more."""
        self._is_closed = True
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
