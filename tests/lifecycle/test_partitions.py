"""Whoever reads a stream by way of a node that is parted from the others for a while, and comes back."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.model import Envelope, Queue, Succeeded, new_id
from leveret.model.status import enqueued, settled
from leveret.testing.bench import cancel_requests
from tests.support.cluster import Cluster
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from leveret.brokers import Consumer
    from leveret.model.status import Status

#: A node needs a while until it is itself again, and whoever reads makes sure of that every twenty seconds or so.
LONG = 150.0


def task() -> Envelope:
    return Envelope(new_id(), "work", "say", b"{}", enqueued_at=time.time())


class Hearer:
    """One program, at one node: what it hears of each task, in order, and which cancellations."""

    def __init__(self, url: str) -> None:
        self.broker = RabbitMQBroker(url, timeout=20.0)
        self.heard: list[str] = []
        self.followed: list[str] = []
        self.marked: set[str] = set()

    async def begin(self, stack: AsyncExitStack, followed: str) -> None:
        self._hear(stack, self._watch(await stack.enter_async_context(self.broker.statuses.watch())))
        self._hear(stack, self._follow(aiter(await stack.enter_async_context(self.broker.statuses.follow([followed])))))
        consuming = self.broker.consume([Queue("other")], credit=1)
        self._hear(stack, self._take(await stack.enter_async_context(consuming)))

    def _hear(self, stack: AsyncExitStack, hearing: Coroutine[None, None, None]) -> None:
        stack.callback(asyncio.create_task(hearing).cancel)

    async def _watch(self, updates: AsyncIterator[Sequence[Status]]) -> None:
        async for batch in updates:
            self.heard += [status.id for status in batch]

    async def _follow(self, updates: AsyncIterator[Sequence[Status]]) -> None:
        async for batch in updates:
            self.followed += [status.state for status in batch]

    async def _take(self, consumer: Consumer) -> None:
        async for request in cancel_requests(consumer):
            self.marked.add(request.id)


@pytest.mark.rabbitmq
@pytest.mark.timeout(400)  # three nodes start on two busy cores
@pytest.mark.parametrize("version", ["3.10", "4"])
async def test_who_reads_a_stream_hears_again_after_a_partition(version: str) -> None:
    """What came meanwhile, and what comes after it: of all tasks, of one, and of what is cancelled; each once."""
    with Cluster(version) as cluster:
        home, away = cluster.nodes[0], cluster.nodes[2]
        producer, hearer = RabbitMQBroker(home.url, timeout=20.0), Hearer(away.url)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(producer.close)
            stack.push_async_callback(hearer.broker.close)
            followed, tasks = task(), [task() for _ in range(4)]
            await producer.statuses.record([enqueued(followed, time.time())])
            await producer.control.cancel("before")
            await hearer.begin(stack, followed.id)
            await producer.statuses.record([enqueued(tasks[0], time.time())])

            async def hears(*ids: str) -> bool:
                return set(ids) <= {*hearer.heard, *hearer.marked, *hearer.followed}

            await until(lambda: hears(tasks[0].id, "before", "queued"), "all is heard before", LONG)
            await asyncio.to_thread(cluster.cut_off, away)
            await producer.statuses.record([enqueued(tasks[1], time.time())])
            await producer.control.cancel("meanwhile")
            await producer.statuses.record([settled(followed, "say", Succeeded(b"1"), time.time())])
            await asyncio.sleep(5.0)  # a partition that lasts
            await asyncio.to_thread(cluster.rejoin, away)
            await asyncio.to_thread(cluster.wait_for_running, 3, away)
            await producer.statuses.record([enqueued(tasks[2], time.time())])
            await until(lambda: hears(tasks[1].id, tasks[2].id), "what came is heard by who watches all", LONG)
            await until(lambda: hears("succeeded"), "the end of its task is heard by who follows one", LONG)
            await until(lambda: hears("meanwhile"), "a worker knows what was cancelled meanwhile", LONG)
            await producer.statuses.record([enqueued(tasks[3], time.time())])
            await producer.control.cancel("after")
            await until(lambda: hears(tasks[3].id, "after"), "what comes from now on is heard", LONG)
            mine = {one.id for one in tasks}
            assert sorted(id_ for id_ in hearer.heard if id_ in mine) == sorted(mine)
            assert hearer.followed == ["queued", "succeeded"]
