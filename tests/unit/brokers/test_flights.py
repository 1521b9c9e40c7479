"""One operation for all who want it at the same time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret.brokers.flights import Flights

if TYPE_CHECKING:
    from collections.abc import Sequence


class Work:
    """An operation that waits until it may end, and remembers what it was asked for."""

    def __init__(self, *bad: str) -> None:
        self.begun: list[Sequence[str]] = []
        self.may_end = asyncio.Event()
        self.bad = set(bad)

    async def __call__(self, keys: Sequence[str]) -> None:
        self.begun.append(keys)
        await self.may_end.wait()
        for key in keys:
            if key in self.bad:
                raise LookupError(key)


async def started(*tasks: asyncio.Task[None]) -> None:
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_one_does_it_for_all() -> None:
    flights, work = Flights[str](), Work()
    callers = [asyncio.create_task(flights.join(["a"], work)) for _ in range(1000)]
    await started(*callers)
    work.may_end.set()
    await asyncio.gather(*callers)
    assert work.begun == [["a"]]
    await flights.join(["a"], work)
    assert work.begun == [["a"], ["a"]]


async def test_only_what_is_not_under_way_begins() -> None:
    flights, work = Flights[str](), Work()
    callers = [asyncio.create_task(flights.join(keys, work)) for keys in (["a", "b"], ["b", "c"], ["c"], [])]
    await started(*callers[:3])
    work.may_end.set()
    await asyncio.gather(*callers)
    assert work.begun == [["a", "b"], ["c"]]


async def test_who_is_cancelled_leaves_it_to_the_others() -> None:
    """The one, too, who began it."""
    flights, work = Flights[str](), Work()
    first, second = (asyncio.create_task(flights.join(["a"], work)) for _ in range(2))
    await started(first, second)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    work.may_end.set()
    await second
    assert work.begun == [["a"]]


async def test_a_failure_is_everybodys_once_it_was_tried_for_them() -> None:
    """Whoever joined one that others had begun has another try, all of them together one."""
    flights, work = Flights[str](), Work("a")
    callers = [asyncio.create_task(flights.join(["a"], work)) for _ in range(100)]
    await started(*callers)
    work.may_end.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert {type(result) for result in results} == {LookupError}
    assert work.begun == [["a"], ["a"]]


async def test_a_failure_of_what_others_want_besides_is_theirs() -> None:
    flights, work = Flights[str](), Work("bad")
    both, one = (asyncio.create_task(flights.join(keys, work)) for keys in (["good", "bad"], ["good"]))
    await started(both, one)
    work.may_end.set()
    with pytest.raises(LookupError):
        await both
    await one
    assert work.begun == [["good", "bad"], ["good"]]


async def test_who_waits_when_it_is_closed_is_told() -> None:
    flights, work = Flights[str](), Work()
    callers = [asyncio.create_task(flights.join(["a"], work)) for _ in range(2)]
    await started(*callers)
    flights.close(LookupError("closed"))
    for caller in callers:
        with pytest.raises(LookupError, match="closed"):
            await caller
    with pytest.raises(LookupError, match="closed"):
        await flights.join(["a"], work)
