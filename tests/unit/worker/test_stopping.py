"""Work in the background is kept, waited for and ended by its owner."""

from __future__ import annotations

import asyncio

from leveret.worker.stopping import Background


async def test_it_is_waited_for_with_what_it_starts() -> None:
    background, done = Background(), list[str]()

    async def first() -> None:
        await asyncio.sleep(0)
        background.start(second())
        done.append("first")

    async def second() -> None:
        await asyncio.sleep(0)
        done.append("second")

    background.start(first())
    await asyncio.wait_for(background.until_done(), 10)
    assert done == ["first", "second"]


async def test_what_does_not_end_in_time_is_cancelled() -> None:
    background, cancelled = Background(), asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    background.start(endless())
    await background.close(within=0.01)
    await asyncio.wait_for(cancelled.wait(), 10)
    await asyncio.wait_for(background.until_done(), 10)


async def test_what_fails_harms_nothing_else() -> None:
    background, done = Background(), asyncio.Event()

    async def failing() -> None:
        raise ValueError

    async def other() -> None:
        await asyncio.sleep(0)
        done.set()

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    background.start(failing())
    background.start(other())
    await asyncio.wait_for(background.until_done(), 10)
    assert done.is_set()


async def test_nothing_to_wait_for_takes_no_time() -> None:
    background = Background()
    await background.until_done()
    await background.close(within=60)
