"""An application that enqueues into memory, and what it enqueued."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leveret import App
from leveret.brokers.memory import MemoryBroker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import OnConflict
    from leveret.client.task import Task
    from leveret.model import Envelope


class KeepingBroker(MemoryBroker):
    """Keeps what it was given to store."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Envelope] = []

    async def publish(self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise") -> None:
        await super().publish(envelopes, on_conflict=on_conflict)
        self.sent.extend(envelopes)


class Outbox(App):
    """Enqueues to a `KeepingBroker` as long as it lives."""

    def __init__(self, **options: Any) -> None:
        super().__init__("memory://", **options)
        self._kept = KeepingBroker()
        self._enqueuing = self.client.enqueuing_to(self._kept)
        self._enqueuing.__enter__()

    @property
    def sent(self) -> list[Envelope]:
        return self._kept.sent


async def sent_by(app: App, task: Task[..., Any], *arguments: Any) -> Envelope:
    """What an enqueue of the task sends."""
    broker = KeepingBroker()
    with app.client.enqueuing_to(broker):
        await task.enqueue(*arguments)
    (envelope,) = broker.sent
    return envelope
