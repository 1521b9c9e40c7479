"""Who admits tasks while this program holds the table of limits: see docs/adr/0042.

`Admission` answers who asks. `Admitting` decides with `Gate` who goes next, and carries it out; `Windows` has what
waits, `Admitted` what was let go.
"""

from __future__ import annotations

from leveret.brokers.rabbitmq.admission.admission import Admission
from leveret.brokers.rabbitmq.admission.asked import (
    Answer,
    AskAlive,
    Asked,
    AskHeld,
    AskUses,
    Clear,
    Count,
    Emptied,
    Ended,
    LookInto,
    Serve,
)
from leveret.brokers.rabbitmq.admission.rows import uses_of

__all__ = [
    "Admission",
    "Answer",
    "AskAlive",
    "AskHeld",
    "AskUses",
    "Asked",
    "Clear",
    "Count",
    "Emptied",
    "Ended",
    "LookInto",
    "Serve",
    "uses_of",
]
