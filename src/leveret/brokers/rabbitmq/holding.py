"""Outcomes that RabbitMQ does not take now: each is held with its delivery, and tried again until it is stored.

A queue may refuse by its policy (`max-length` with `reject-publish`), be deleted, or be closed to this user. Whatever
it is, the task has run, and must not run again for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.rabbitmq.queues import delay_step
from leveret.errors import BrokerRefused, LeveretError, QueueFull, QueueNotFound, TaskTooLarge
from leveret.model import log_fields
from leveret.model.printable import in_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.brokers.rabbitmq.consumer import Session
    from leveret.model import Delivery

log = logging.getLogger("leveret.rabbitmq")

#: Longest wait before a queue that refuses is tried again (seconds); each refusal for want of a permission, and each of
#: what is too large, closes the channel that all publish on.
_LONGEST = 5.0
RARELY = 60.0
#: A retry that its queue has no room for waits so long (seconds): on the delay queue of two seconds, and the rest in a
#: worker, since each return to a full queue may be refused.
_ASIDE = 2.1
#: How often it is logged that outcomes are held still (seconds).
REMIND = 60.0


class Target:
    """A queue that does not take outcomes now. One of those that are held for it is tried, then the others in turn."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        #: Task ids.
        self.held: set[str] = set()
        self.told_at = float("-inf")


class Holding:
    """Those of one broker. ``store``: raises LeveretError. ``mend``: makes a delivery's queues again."""

    def __init__(
        self, store: Callable[[Sequence[Message]], Awaitable[None]], mend: Callable[[Delivery], Awaitable[None]]
    ) -> None:
        self._store = store
        self._mend = mend
        self._targets: dict[str, Target] = {}
        self._given_up: list[str] = []

    async def store(self, session: Session, delivery: Delivery, message: Message) -> None:
        """Store a copy durably, before its original is acknowledged; tried for as long as the lease is held."""
        if not session.holds(delivery.tag):
            return
        try:
            await self._try(delivery, message)
        except LeveretError as error:
            session.lend(delivery.tag)
            await self._hold(session, delivery, message, error)

    def given_up(self) -> Sequence[str]:
        """The tasks whose outcome was not stored before a stop, since this was asked last."""
        ids, self._given_up = self._given_up, []
        return ids

    async def _try(self, delivery: Delivery, message: Message) -> None:
        try:
            await self._store([message])
        except QueueNotFound:
            # It was deleted under its running task. The session mends what it consumes; this may come first.
            await self._mend(delivery)
            await self._store([message])
        except QueueFull:
            if message.due is not None or message.queue != message.home:
                raise
            # Its consumers make the room, and they may all hold such a retry.
            await self._store([msgspec.structs.replace(message, due=time.time() + _ASIDE)])

    async def _hold(self, session: Session, delivery: Delivery, message: Message, error: LeveretError) -> None:
        name = _place(message, error)
        target = self._targets.setdefault(name, Target())
        target.held.add(delivery.envelope.id)
        try:
            async with target.turn:
                for pause in backoff(longest=_LONGEST):
                    self._say(name, target, delivery, error)
                    await asyncio.sleep(RARELY if isinstance(error, (TaskTooLarge, BrokerRefused)) else pause)
                    if not session.holds(delivery.tag):
                        return
                    try:
                        await self._try(delivery, message)
                    except LeveretError as again:
                        error = again
                    else:
                        break
        except asyncio.CancelledError:
            self._given_up.append(delivery.envelope.id)
            raise
        finally:
            target.held.discard(delivery.envelope.id)
            if not target.held:
                self._targets.pop(name, None)
        if not target.held:
            log.info("the outcomes that %s did not take are all stored", name)

    def _say(self, name: str, target: Target, delivery: Delivery, error: LeveretError) -> None:
        """Once, and then now and then, however many they are."""
        now = asyncio.get_running_loop().time()
        if now - target.told_at < REMIND:
            return
        target.told_at = now
        others = len(target.held) - 1
        log.warning(
            "the outcome of task %s%s cannot be stored in %s; it is held and tried again, and the task does not run "
            "again meanwhile: %s",
            in_line(delivery.envelope.id),
            f" and of {others} more" if others > 0 else "",
            name,
            error,
            extra=log_fields(delivery.envelope),
        )


def _place(message: Message, error: LeveretError) -> str:
    """Where it was to be stored; what is too large for the server waits for itself alone."""
    waits = message.due is not None and delay_step(message.due - time.time()) is not None
    queue = f"a delay queue of {message.home!r}" if waits else f"queue {message.queue!r}"
    return queue + (f" (task {in_line(message.id)})" if isinstance(error, TaskTooLarge) else "")
