"""What arrives at a consumer: in which order, and what a reader that gives up leaves."""

from __future__ import annotations

import asyncio

import pytest

from leveret.brokers import CancelRequests, Deliveries, Inbox, Paused
from leveret.model import CancelRequest, Delivery, Envelope


class Lease:
    held = True


ONE, TWO = (Delivery(Envelope(id_, "work", "say", b""), Lease(), tag) for tag, id_ in enumerate("12"))
REQUEST = CancelRequest("1", 0.0)


async def test_what_keeps_a_task_from_running_comes_before_it() -> None:
    inbox = Inbox()
    inbox.deliver([ONE])
    inbox.cancel([REQUEST])
    inbox.deliver([TWO])
    inbox.pause(frozenset({"work"}))
    assert [await anext(inbox) for _ in range(3)] == [
        Paused(frozenset({"work"})),
        CancelRequests((REQUEST,)),
        Deliveries((ONE, TWO)),
    ]


async def test_nothing_arrives_that_says_nothing() -> None:
    inbox = Inbox()
    reading = asyncio.ensure_future(anext(inbox))
    inbox.deliver([])
    inbox.cancel([])
    inbox.pause(frozenset())
    await asyncio.sleep(0.01)
    assert not reading.done()
    inbox.close()
    with pytest.raises(StopAsyncIteration):
        await reading


async def test_a_read_that_is_cancelled_takes_nothing() -> None:
    inbox = Inbox()
    reading = asyncio.ensure_future(anext(inbox))
    await asyncio.sleep(0)
    inbox.deliver([ONE])
    reading.cancel()
    await asyncio.wait([reading])
    assert await anext(inbox) == Deliveries((ONE,))


async def test_what_arrived_is_read_before_a_failure_is_raised() -> None:
    inbox = Inbox()
    inbox.fail(RuntimeError("no more"))
    inbox.deliver([ONE])
    assert await anext(inbox) == Deliveries((ONE,))
    with pytest.raises(RuntimeError, match="no more"):
        await anext(inbox)
