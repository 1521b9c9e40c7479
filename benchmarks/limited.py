"""Workers' applications with limits, their producers, and the two ends of a gate on RabbitMQ."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from benchmarks.entrants import EACH, KEYS, RATE, TENANTS, UNREACHED
from benchmarks.peers.ledger import note_run, own_ledger
from benchmarks.peers.producing import Order, produce_batches, queue, url
from leveret import App, Queue, Rate
from leveret.brokers import connect
from leveret.model import LIMITS, DeclareLimits, Envelope, LimitRule, Succeeded, limit_header, new_id
from leveret.testing.bench import batches_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers import Broker
    from leveret.client.limits import Limit
    from leveret.client.task import Task

_BATCH = 1_000
#: How long a task computes that does something (seconds).
_COMPUTES = 1e-3
_NAME = "bench-through"
_CREDIT = 1_000
_LONG = 120.0


def _app() -> App:
    return App(url(), queues=())


def _noop(app: App, limits: Sequence[Limit] = ()) -> Task[[int], None]:
    @app.task(name="noop", queue=queue(), store_result=False, limits=limits)
    async def noop(task: int) -> None:
        note_run(task)

    return noop


def _computing(app: App, limits: Sequence[Limit] = ()) -> Task[[int], None]:
    @app.task(name="compute", queue=queue(), store_result=False, limits=limits)
    async def compute(task: int) -> None:
        note_run(task)
        until = time.thread_time() + _COMPUTES
        while time.thread_time() < until:
            pass

    return compute


def _unreached(app: App) -> list[Limit]:
    return [app.limit("bench-unreached", concurrency=UNREACHED)]


def _rated(app: App) -> list[Limit]:
    return [app.limit("bench-rated", rate=Rate(RATE))]


without, limited, rated, computing, computing_limited, keyed = (_app() for _ in range(6))
fair = App(url(), queues=[Queue(queue(), fair_by="tenant")])
_keys = keyed.limit("bench-keys", concurrency=1, by="key")


@keyed.task(name="keyed", queue=queue(), store_result=False, limits=_keys)
async def of_a_key(task: int, key: int) -> None:
    del key
    note_run(task)


@fair.task(name="fair", queue=queue(), store_result=False)
async def of_a_tenant(task: int, tenant: str) -> None:
    del tenant
    note_run(task)


def _tenant(task: int, count: int) -> tuple[int, str]:
    """Those of small tenants are the last ones."""
    small = task - (count - TENANTS * EACH)
    return task, "many" if small < 0 else f"small {small % TENANTS}"


_TASKS: dict[str, tuple[App, Task[..., None], Callable[[int, int], tuple[Any, ...]]]] = {
    "without": (without, _noop(without), lambda task, _: (task,)),
    "limited": (limited, _noop(limited, _unreached(limited)), lambda task, _: (task,)),
    "rated": (rated, _noop(rated, _rated(rated)), lambda task, _: (task,)),
    "computing": (computing, _computing(computing), lambda task, _: (task,)),
    "computing_limited": (
        computing_limited,
        _computing(computing_limited, _unreached(computing_limited)),
        lambda task, _: (task,),
    ),
    "fair": (fair, of_a_tenant, _tenant),
    "keyed": (keyed, of_a_key, lambda task, _: (task, task % KEYS)),
}


async def enqueue(what: str) -> None:
    app, task, arguments = _TASKS[what]
    order = Order.read()

    async def many(tasks: Sequence[int]) -> None:
        for one in tasks:
            own_ledger().note_sent(one)
        await task.enqueue_many(arguments(one, len(order.tasks)) for one in tasks)

    async with app:
        await produce_batches(many, order, _BATCH)


async def admit() -> None:
    """Admit tasks until this program is stopped."""
    broker = connect(url())
    async with broker.limits.keep():
        await asyncio.Event().wait()


async def through(count: int) -> dict[str, float]:
    """Tasks a second through a gate whose limit is not reached, from its first to a consumer that ends them at once."""
    broker = connect(url())
    await broker.declare([Queue(queue())])
    rule = LimitRule(concurrency=UNREACHED)
    await broker.limits.ask(DeclareLimits(time.time(), {_NAME: rule}, (queue(),)))
    headers = {LIMITS: limit_header([(_NAME, "")])}
    for first in range(0, count, _BATCH):
        tasks = range(first, min(first + _BATCH, count))
        await broker.publish([Envelope(new_id(), queue(), "noop", b"{}", headers=headers) for _ in tasks])
    used = time.process_time()
    began, ended = await asyncio.wait_for(_end_all(broker, count), _LONG)
    used = time.process_time() - used
    await broker.close()
    return {"through": count / (ended - began), "consumer": used * 1e6 / count}


async def _end_all(broker: Broker, count: int) -> tuple[float, float]:
    """When the first one came, and when the last one was ended."""
    began = 0.0
    async with broker.consume([Queue(queue())], credit=_CREDIT) as consumer:
        async for deliveries in batches_of(consumer):
            began = began or time.perf_counter()
            await broker.settle([(one, Succeeded()) for one in deliveries])
            count -= len(deliveries)
            if count <= 0:
                break
    return began, time.perf_counter()


if __name__ == "__main__":
    if sys.argv[2] == "admit":
        asyncio.run(admit())
    elif sys.argv[2] == "through":
        print(json.dumps(asyncio.run(through(**json.loads(sys.argv[1])))))
    else:
        asyncio.run(enqueue(sys.argv[2]))
