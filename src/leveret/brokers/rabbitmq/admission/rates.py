"""Slow rates: when they started last is durable, since a new holder that did not know would wait as long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.rabbitmq.admission.rows import SlowRate, rate_key, rates_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from leveret.brokers.gate import Permits
    from leveret.brokers.rabbitmq.coordination import Tenure
    from leveret.model import LimitRef

#: A rate with so long between two starts (seconds) has a row with when it may start again. So many have one at most.
SLOW = 1.0
_MOST_RATES = 2_000
_pack = msgspec.msgpack.Encoder().encode


class SlowRates:
    """Those that have a row."""

    def __init__(self, tenure: Tenure, permits: Permits) -> None:
        self._tenure = tenure
        self._permits = permits
        #: When a whole burst of each may start.
        self._full_at: dict[LimitRef, float] = {}

    def load(self, rows: Mapping[str, bytes]) -> None:
        for rate in rates_of(rows):
            self._full_at[rate.ref] = rate.full_at
            self._permits.restore_rate(rate.ref, rate.full_at)

    async def keep(self, refs: Iterable[LimitRef], now: float) -> None:
        """What those of these that are slow have started is durable before it starts. Raises TenureLost."""
        started = {ref: self._permits.full_at(ref) for ref in refs if self._is_slow(ref)}
        if not started:
            return
        over = [ref for ref, full_at in self._full_at.items() if full_at <= now and ref not in started]
        self._full_at.update(started)
        for ref in over:
            del self._full_at[ref]
        rows: dict[str, bytes | None] = {rate_key(ref): None for ref in over}
        if len(self._full_at) <= _MOST_RATES:
            rows |= {rate_key(ref): _pack(SlowRate(*ref, full_at)) for ref, full_at in started.items()}
        await self._tenure.change(rows)

    def _is_slow(self, ref: LimitRef) -> bool:
        row = self._permits.rows.get(ref[0])
        return row is not None and row.rule.rate is not None and row.rule.rate.interval >= SLOW
