"""What several programs must agree on: a fenced table, which one of them at a time holds (docs/adr/0038), and who has a
key (docs/adr/0039).
"""

from __future__ import annotations

from leveret.brokers.rabbitmq.coordination.claims import Claims, claimed_keys, mark_of
from leveret.brokers.rabbitmq.coordination.entries import MOST_RIDING
from leveret.brokers.rabbitmq.coordination.membership import MOST_ROWS, Ride, Side, TenureLost
from leveret.brokers.rabbitmq.coordination.table import FencedTable, Request, Tenure

__all__ = [
    "MOST_RIDING",
    "MOST_ROWS",
    "Claims",
    "FencedTable",
    "Request",
    "Ride",
    "Side",
    "Tenure",
    "TenureLost",
    "claimed_keys",
    "mark_of",
]
