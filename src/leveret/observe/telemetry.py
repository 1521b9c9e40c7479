"""What is wrapped around each enqueue and each run to trace and measure it; `OpenTelemetry` is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from leveret.model import Cancelled, DeadLettered, Outcome, Released, Retrying, Succeeded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from leveret.model import Envelope

Kind: TypeAlias = Literal["succeeded", "retrying", "dead", "released", "cancelled"]
#: Told once how a run ended, and by which exception if by one.
Ended: TypeAlias = Callable[[Outcome, BaseException | None], None]

#: In metrics, the name of a task that the application does not have: anybody may send any name.
UNKNOWN = "(unknown)"
_KINDS: dict[type, Kind] = {
    Succeeded: "succeeded",
    Retrying: "retrying",
    DeadLettered: "dead",
    Released: "released",
    Cancelled: "cancelled",
}


def kind(outcome: Outcome) -> Kind:
    """One word for an outcome. released: interrupted by a stop, and handed back."""
    return _KINDS[type(outcome)]


class Telemetry(Protocol):
    """Wrapped around what an application does. ``url``: the broker's; it may hold a password."""

    def sending(self, envelopes: Sequence[Envelope], url: str, /) -> AbstractContextManager[Sequence[Envelope]]:
        """Around storing these tasks; what is stored is what it gives, with headers of its own."""

    def processing(self, envelope: Envelope, url: str, /) -> AbstractContextManager[Ended]:
        """Around one attempt, also at what turns out to be no task, or to have wrong arguments."""
