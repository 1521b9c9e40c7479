"""Many timeouts by one timer: each as `asyncio.timeout` would be."""

from __future__ import annotations

import asyncio

import pytest

from leveret.brokers.deadlines import Deadlines

SHORT = 0.05


async def hang() -> None:
    await asyncio.Event().wait()


async def test_what_is_late_raises() -> None:
    deadlines = Deadlines(SHORT)
    for _ in range(2):
        with pytest.raises(TimeoutError), deadlines.begin():
            await hang()


async def test_each_has_its_own_time() -> None:
    """One that began later is not ended with the first, and one that is over is not ended at all."""
    deadlines = Deadlines(SHORT)
    ended: list[str] = []

    async def late(name: str) -> None:
        with pytest.raises(TimeoutError), deadlines.begin():
            await hang()
        ended.append(name)

    first = asyncio.create_task(late("first"))
    await asyncio.sleep(SHORT / 2)
    with deadlines.begin():
        ended.append("done")
    second = asyncio.create_task(late("second"))
    await first
    assert ended == ["done", "first"]
    await second
    await asyncio.sleep(0)  # nothing more comes


async def test_a_cancellation_stays_one() -> None:
    deadlines = Deadlines(60.0)

    async def wait() -> None:
        with deadlines.begin():
            await hang()

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_wins_over_the_deadline() -> None:
    """Both in the same turn of the loop."""
    deadlines = Deadlines(SHORT)

    async def wait() -> None:
        with deadlines.begin():
            try:
                await hang()
            except asyncio.CancelledError:
                asyncio.current_task().cancel()  # type: ignore[union-attr] # a task runs this
                raise

    task = asyncio.create_task(wait())
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_of_the_block_is_not_hidden() -> None:
    deadlines = Deadlines(SHORT)

    async def fail_late() -> None:
        with deadlines.begin():
            try:
                await hang()
            except asyncio.CancelledError:
                raise ValueError("a mistake") from None

    with pytest.raises(ValueError, match="a mistake"):
        await fail_late()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_they_are_nested() -> None:
    outer, inner = Deadlines(60.0), Deadlines(SHORT)
    with outer.begin(), pytest.raises(TimeoutError), inner.begin():
        await hang()
