"""A worker that is killed at a step of taking one task: ``python -m tests.support.dying_worker URL QUEUE STEP``.

Its broker's parts are patched so that nothing runs between the step and the kill. It prints the body that it was given.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any, NoReturn

from leveret import Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq.broker import RabbitMQBroker
from leveret.model import Retrying, Succeeded
from leveret.testing.bench import Taken


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it is dead")


def dies_after(call: Any) -> Any:
    async def called(*args: Any) -> NoReturn:
        await call(*args)
        die()

    return called


async def work(url: str, queue: str, step: str) -> None:
    broker = connect(url, timeout=20.0)
    if isinstance(broker, RabbitMQBroker):
        claims: Any = broker._claims
        match step:
            case "delivered":
                claims.begin = die
            case "asked":
                claims.begin = dies_after(claims.begin)
            case "freed":
                claims.ended = dies_after(claims.ended)
            case "copied":
                holding: Any = broker._holding
                holding.store = dies_after(holding.store)
    async with broker.consume([Queue(queue)], credit=1) as consumer:
        (delivery,) = await Taken(consumer).next()
        print(delivery.envelope.body.decode(), flush=True)
        if step != "taken":
            outcome = Retrying("again") if step == "copied" else Succeeded()
            await broker.settle([(delivery, outcome)])
        die()


if __name__ == "__main__":
    asyncio.run(work(*sys.argv[1:]))
