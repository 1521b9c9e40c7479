"""The rows of the table of limits: the limits, queues whose tasks may wait, permits, and slow rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.gate import Gate, Permit, Permits
from leveret.model import LimitRow, decoded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leveret.model import LimitRef, LimitUse

_LIMIT, _PERMIT, _QUEUE, _RATE = "l", "p", "q", "r"


class Stored(msgspec.Struct, frozen=True, array_like=True):
    """A permit's row."""

    id: str
    stay: str
    queue: str
    refs: list[tuple[str, str]]

    @property
    def permit(self) -> Permit:
        return Permit(self.queue, tuple(self.refs))


class SlowRate(msgspec.Struct, frozen=True, array_like=True):
    """A slow rate's row: see `leveret.model.Rate.started`."""

    limit: str
    key: str
    full_at: float

    @property
    def ref(self) -> LimitRef:
        return self.limit, self.key


_row_of = msgspec.json.Decoder(LimitRow).decode
_stored_of = msgspec.msgpack.Decoder(Stored).decode
_rate_of = msgspec.msgpack.Decoder(SlowRate).decode
_pack_row = msgspec.json.Encoder().encode


def queue_key(queue: str) -> str:
    return _QUEUE + queue


def limit_key(name: str) -> str:
    return _LIMIT + name


def permit_key(permit: str) -> str:
    return _PERMIT + permit


def rate_key(ref: LimitRef) -> str:
    return _RATE + _pack_row(ref).decode()


def limit_value(row: LimitRow | None) -> bytes | None:
    return None if row is None else _pack_row(row)


def limits_of(rows: Mapping[str, bytes]) -> dict[str, LimitRow]:
    found = [decoded(_row_of, value) for key, value in rows.items() if key.startswith(_LIMIT)]
    return {row.name: row for row in found if row is not None}


def queues_of(rows: Mapping[str, bytes]) -> list[str]:
    return [key[1:] for key in rows if key.startswith(_QUEUE)]


def permits_of(rows: Mapping[str, bytes]) -> dict[str, Stored]:
    """By permit."""
    found = {key[1:]: decoded(_stored_of, value) for key, value in rows.items() if key.startswith(_PERMIT)}
    return {permit: stored for permit, stored in found.items() if stored is not None}


def rates_of(rows: Mapping[str, bytes]) -> list[SlowRate]:
    found = [decoded(_rate_of, value) for key, value in rows.items() if key.startswith(_RATE)]
    return [rate for rate in found if rate is not None]


def uses_of(rows: Mapping[str, bytes]) -> list[LimitUse]:
    """What a table's rows tell of its limits: nobody admits tasks now, so what waits is not known."""
    gate: Gate[None] = Gate(Permits())
    gate.define(limits_of(rows))
    for permit, stored in permits_of(rows).items():
        gate.permits.restore(permit, stored.permit)
    return gate.uses()
