"""A task as a row of the outbox: all that the relay needs to publish it, without the code of the task."""

from __future__ import annotations

from typing import Any

import msgspec

from leveret.brokers import OnConflict
from leveret.model import Envelope


class StoredTask(msgspec.Struct, frozen=True, gc=False):
    """A task that waits for its relay, and how it is to be enqueued."""

    envelope: Envelope
    #: What becomes of it if its unique key, or its own id, is taken. The relay takes "raise" as "ignore".
    on_conflict: OnConflict = "raise"
    #: Whether those who follow it are told that it is enqueued.
    notify: bool = True

    def row(self) -> tuple[Any, ...]:
        """The columns of `leveret.outbox.statements.INSERT`."""
        envelope = self.envelope
        return envelope.id, envelope.task, envelope.queue, _encode(self), envelope.enqueued_at


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StoredTask).decode


def stored_task(message: bytes) -> StoredTask:
    """Raises ValueError for what is no stored task."""
    return _decode(message)
