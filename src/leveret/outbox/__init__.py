"""The transactional outbox: tasks that are stored with a user's own transaction, and the relay that publishes them.

`connections` knows the users' connections, `database` is the relay's, and both are found when they are needed.
"""

from __future__ import annotations

from leveret.outbox.connections import SameFile, insert, insert_sync
from leveret.outbox.inbox import Results, current_transaction, within_inbox
from leveret.outbox.message import StoredTask
from leveret.outbox.relay import BATCH, Publisher, Relay, open_database
from leveret.outbox.statements import DIALECTS, MOST_TRIES, create_inbox, create_outbox

__all__ = [
    "BATCH",
    "DIALECTS",
    "MOST_TRIES",
    "Publisher",
    "Relay",
    "Results",
    "SameFile",
    "StoredTask",
    "create_inbox",
    "create_outbox",
    "current_transaction",
    "insert",
    "insert_sync",
    "open_database",
    "within_inbox",
]
