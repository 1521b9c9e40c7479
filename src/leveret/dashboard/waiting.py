"""The tasks that wait in a queue, as the dashboard saw them last."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.dashboard.redaction import arguments
from leveret.dashboard.text import short
from leveret.errors import PeekRefused

if TYPE_CHECKING:
    from leveret.brokers import WaitingState
    from leveret.client import App
    from leveret.dashboard.redaction import Redact
    from leveret.model import Envelope

#: So many of each state are shown, and so much of the arguments (characters).
SHOWN = 20
_BEGINNING = 200
#: They are looked at again after that (seconds): on RabbitMQ workers cannot have them meanwhile.
_STALE = 5.0


class WaitingTask(msgspec.Struct, frozen=True):
    """One that waits; of its arguments the beginning, redacted."""

    id: str
    task: str | None
    enqueued_at: float | None
    due: float | None
    priority: int | None
    attempt: int
    arguments: str


class Shown(msgspec.Struct, frozen=True):
    """Those of one state, the next first; or why they are not shown."""

    tasks: list[WaitingTask] = []
    refusal: str = ""
    at: float = 0.0


_Key: TypeAlias = "tuple[str, WaitingState]"


class WaitingTasks:
    """One look at a time: who looks, on RabbitMQ, has what others would see."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._seen: dict[_Key, Shown] = {}
        self._looking = asyncio.Lock()

    async def shown(self, queue: str, state: WaitingState, redact: Redact | None) -> Shown:
        """What waits in a queue. Raises BrokerError."""
        async with self._looking:
            now = time.monotonic()
            self._seen = {key: one for key, one in self._seen.items() if now - one.at < _STALE}
            if (queue, state) not in self._seen:
                self._seen[queue, state] = await self._look(queue, state, redact)
            return self._seen[queue, state]

    async def _look(self, queue: str, state: WaitingState, redact: Redact | None) -> Shown:
        try:
            found = await self._app.client.broker.queues.peek(queue, state, limit=SHOWN)
        except PeekRefused as error:
            return Shown(refusal=str(error), at=time.monotonic())
        return Shown([self._task(one, redact) for one in found], at=time.monotonic())

    def _task(self, one: Envelope, redact: Redact | None) -> WaitingTask:
        given = ", ".join(f"{argument.name}={argument.value}" for argument in arguments(self._app, one, redact))
        return WaitingTask(
            one.id, one.task, one.enqueued_at, one.due, one.priority, one.attempt, short(given, _BEGINNING)
        )

    def forget(self) -> None:
        self._seen.clear()
