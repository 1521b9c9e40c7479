"""Which queues whoever looks on asks for: those that were named to it, and those that it hears of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leveret.errors import BrokerUnavailable, LeveretError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leveret.brokers.base import Broker
    from leveret.model import QueueStats

#: Anybody may tell of queues.
_MOST = 1_000


class QueueNames:
    """The names. Those that were only heard of cost nobody the rest."""

    def __init__(self, named: Iterable[str]) -> None:
        self._named = frozenset(named)
        self._heard: dict[str, None] = {}
        self._refused: set[str] = set()

    def hear(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self._heard) < _MOST and name not in self._named and name not in self._refused:
                self._heard[name] = None

    async def stats(self, broker: Broker) -> Sequence[QueueStats]:
        """Raises BrokerError, for what was named."""
        try:
            return await broker.queues.stats(sorted({*self._named, *self._heard}))
        except BrokerUnavailable:
            raise
        except LeveretError:
            if not await self._forget_refused(broker):
                raise
        return await broker.queues.stats(sorted({*self._named, *self._heard}))

    async def _forget_refused(self, broker: Broker) -> bool:
        """Whether some of those that were heard of cannot be asked for: another program's own, for one."""
        refused = []
        for name in self._heard:
            try:
                await broker.queues.stats([name])
            except BrokerUnavailable:
                raise
            except LeveretError:
                refused.append(name)
        for name in refused:
            del self._heard[name]
        if len(self._refused) < _MOST:
            self._refused.update(refused)
        return bool(refused)
