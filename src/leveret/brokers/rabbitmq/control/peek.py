"""Looking at ready tasks: held unacknowledged for a moment, and handed back all at once.

Since RabbitMQ 4.3 what a quorum queue has back by `basic.nack` does not count, and comes before all others, behind what
came back earlier. So each look holds the same number of the first ones, however few are wanted: then all that the look
before handed back is held together, and keeps its order. Before 4.3 it counts as a return, of which 15 make a task a
dead letter, and in 3.10 it goes to the end of its queue. So there only classic queues are looked into.

Delay queues are not: RabbitMQ takes out what has waited long enough from their beginning, and what is handed back there
would make others late, where priorities differ by up to the queue's time.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.queues import examine, peeked, require_queue, task_declaration
from leveret.errors import PeekRefused
from leveret.model import Queue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers.base import WaitingState
    from leveret.brokers.rabbitmq.amqp import Hosts
    from leveret.model import Envelope

#: So many are held; of more at once RabbitMQ 4.3 mixes the order. Each is a round trip, and workers cannot have it.
_HELD = 32
#: No more is kept of them for the caller (bytes).
_MOST_BYTES = 32 * 1024 * 1024
#: Since then a look at a quorum queue does no harm.
_HARMLESS = (4, 3)
_INSTEAD = (
    "Nothing was looked at. leveret queues counts what waits; leveret status ID tells of one task, and the dashboard "
    "of those that changed last"
)


async def peek(hosts: Hosts, queue: str, state: WaitingState, limit: int) -> Sequence[Envelope]:
    """See `leveret.brokers.Queues.peek`. Raises what aio-pika raises, too."""
    # By a connection of its own: what it holds goes back when it is lost, and nothing else is lost with it.
    link = await amqp.Link.open(hosts, purpose="a look at tasks", confirms=False)
    try:
        await require_queue(link.connection, queue)
        if state == "delayed":
            raise PeekRefused(
                f"RabbitMQ cannot show what is delayed in queue {queue!r}: a look would make some of it late. "
                f"{_INSTEAD}"
            )
        version = amqp.server_version(link.connection)
        if version < _HARMLESS and await _is_quorum(link, queue):
            raise PeekRefused(
                f"RabbitMQ {'.'.join(map(str, version))} cannot show what is ready in queue {queue!r}: of a quorum "
                f"queue each look counts as a return of the task, and may move it, before RabbitMQ 4.3. {_INSTEAD}"
            )
        return (await _look(link, queue))[:limit]
    finally:
        await link.close()


async def _is_quorum(link: amqp.Link, queue: str) -> bool:
    found = await examine(link.connection, task_declaration(Queue(queue)))
    return bool(found.arguments.get("x-queue-type", "classic") != "classic")


async def _look(link: amqp.Link, queue: str) -> list[Envelope]:
    """Hold what is first, until all of it is handed back."""
    channel, as_delivered = link.channel, link.keep_headers()
    found: list[Envelope] = []
    size, last = 0, 0
    try:
        for _ in range(_HELD):
            message = await link.run(channel.basic_get(queue))
            if isinstance(message.delivery, amqp.GetEmpty):
                break
            last = message.delivery_tag or last
            size += len(message.body)
            if size <= _MOST_BYTES:
                found.append(peeked(as_delivered(message), queue))
    except amqp.ChannelLockedResource as error:
        raise PeekRefused(
            f"RabbitMQ cannot show what is ready in queue {queue!r}, since it has a single active consumer. {_INSTEAD}"
        ) from error
    finally:
        if last:
            with suppress(*amqp.CONNECTION_LOST):  # they are back, then
                await channel.basic_nack(last, multiple=True, requeue=True, wait=False)
                # Answered when the queue has them.
                await link.run(channel.queue_declare(queue, passive=True))
    return found
