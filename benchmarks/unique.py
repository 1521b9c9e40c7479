"""Programs of tasks with unique keys: what they cost beside plain ones, and what it costs to begin beside many."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec

from benchmarks import processes
from benchmarks.peers.producing import queue, url
from leveret import App, Queue, by
from leveret.brokers.rabbitmq.broker import RabbitMQBroker
from leveret.brokers.rabbitmq.coordination.claim_entries import Entry, NewClaim
from leveret.brokers.rabbitmq.coordination.claims import HOLD
from leveret.model import UNIQUE_KEY, Envelope, new_id

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from leveret.client.task import Task

app = App(url(), queues=())
#: Tasks of one enqueue_many; claims of one entry of the log, and how many entries are written at once.
_BATCH, _CLAIMS, _AT_ONCE = 1_000, 500, 8
_TIMEOUT = 60.0


@app.task(queue=queue())
async def plain(number: int) -> None: ...


@app.task(queue=queue(), unique=by("number"))
async def unique(number: int) -> None: ...


async def rates(tasks: int, outstanding: int, rounds: int) -> dict[str, float]:
    """Tasks a second with a key of their own each, and to the same without one, in pairs."""
    found: dict[str, list[float]] = {"unique": [], "unique to plain": [], "unique many to plain many": []}
    numbers = count(time.time_ns())
    async with app:
        for task in (plain, unique):
            await task.enqueue(next(numbers))
        for turn in range(rounds):
            single, many = {}, {}
            for task in (plain, unique) if turn % 2 else (unique, plain):
                ours = [next(numbers) for _ in range(2 * tasks)]
                single[task] = await _rate(task, ours[:tasks], outstanding)
                many[task] = await _rate_many(task, ours[tasks:])
            found["unique"].append(single[unique])
            found["unique to plain"].append(single[unique] / single[plain])
            found["unique many to plain many"].append(many[unique] / many[plain])
    return {name: statistics.median(values) for name, values in found.items()}


async def _rate(task: Task[[int], None], numbers: Sequence[int], outstanding: int) -> float:
    left, began = iter(numbers), time.perf_counter()

    async def sender() -> None:
        for number in left:
            await task.enqueue(number)

    await asyncio.gather(*(sender() for _ in range(outstanding)))
    return len(numbers) / (time.perf_counter() - began)


async def _rate_many(task: Task[[int], None], numbers: Sequence[int]) -> float:
    began = time.perf_counter()
    for first in range(0, len(numbers), _BATCH):
        await task.enqueue_many((number,) for number in numbers[first : first + _BATCH])
    return len(numbers) / (time.perf_counter() - began)


async def fill(live: int, ended: int) -> dict[str, float]:
    """Write a log of so many tasks that have ended, and then of so many that are there: claims without the tasks."""
    broker = RabbitMQBroker(url(), timeout=_TIMEOUT)
    await broker.declare([Queue(queue())])
    claims = broker._claims
    await claims._reader.begin()

    async def batch(first: int, *, ends: bool) -> None:
        made = [_claim(number) for number in range(first, first + _CLAIMS)]
        pairs = [(one.key, one.id) for one in made]
        await claims._append(Entry(claims=made))
        await claims._append(Entry(stored=pairs, freed=pairs if ends else []))

    async def write(numbers: range, *, ends: bool) -> None:
        step = _CLAIMS * _AT_ONCE
        for first in numbers[::step]:
            firsts = range(first, min(first + step, numbers.stop), _CLAIMS)
            await asyncio.gather(*(batch(one, ends=ends) for one in firsts))

    await write(range(live, live + ended), ends=True)
    # As a worker does that looks after the log.
    await claims._sum_up()
    await write(range(live), ends=False)
    await broker.close()
    return {}


def _claim(number: int) -> NewClaim:
    task = Envelope(new_id(), queue(), "unique", b'{"args":[%d],"kwargs":{}}' % number)
    return NewClaim(f"unique:{number}", task.id, queue(), time.time() + HOLD, msgspec.Raw(msgspec.json.encode(task)))


async def begin() -> dict[str, float]:
    """What the first task with a key costs a program that has enqueued another: seconds, and MB of memory."""
    broker = RabbitMQBroker(url(), timeout=_TIMEOUT)
    await broker.declare([Queue(queue())])
    await broker.publish([Envelope(new_id(), queue(), "plain", b"{}")])
    before, began = processes.resident([os.getpid()]), time.perf_counter()
    wanted = Envelope(new_id(), queue(), "unique", b"{}", headers={UNIQUE_KEY: "unique:5"})
    assert await broker.publish([wanted], on_conflict="ignore"), "its key is taken"
    took = {"seconds": time.perf_counter() - began, "MB": (processes.resident([os.getpid()]) - before) / 1e6}
    await broker.close()
    return took


_PROGRAMS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, float]]]] = {
    "rates": rates,
    "fill": fill,
    "begin": begin,
}

if __name__ == "__main__":
    print(json.dumps(asyncio.run(_PROGRAMS[sys.argv[2]](**json.loads(sys.argv[1])))))
