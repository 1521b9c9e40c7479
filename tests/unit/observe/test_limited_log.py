"""One line for what comes by the thousand, and how often it came."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from leveret.observe.limited_log import LimitedLog
from tests.support.waiting import until

if TYPE_CHECKING:
    import pytest

log = logging.getLogger("leveret.test")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == log.name]


async def test_a_thousand_are_one_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    limited = LimitedLog(log, every=1.0)
    for number in range(1_000):
        limited.warning("task %d: %s", number, "no")
    limited.warning("another %s", "kind")
    assert lines(caplog) == ["task 0: no", "another kind"]
    await until(lambda: told(caplog, 3), "the count is told")
    assert lines(caplog)[2].startswith("999 more in ")
    assert lines(caplog)[2].endswith(" s: task 999: no")


async def told(caplog: pytest.LogCaptureFixture, count: int) -> bool:
    return len(lines(caplog)) >= count


async def test_they_go_on_being_counted(caplog: pytest.LogCaptureFixture) -> None:
    """As long as they come: a line for each while, and none when there are no more."""
    limited = LimitedLog(log, every=0.05)

    async def coming() -> bool:
        limited.warning("task %d", 1)
        return len(lines(caplog)) >= 4

    await until(coming, "it was told several times")
    assert lines(caplog)[0] == "task 1"
    assert any("more in 0 s: task 1" in line for line in lines(caplog)[1:])


def test_without_a_loop_the_next_line_or_the_end_tells(caplog: pytest.LogCaptureFixture) -> None:
    limited = LimitedLog(log, every=60.0)
    for number in range(3):
        limited.warning("task %d", number)
    limited.flush()
    limited.flush()
    assert lines(caplog) == ["task 0", "2 more in 0 s: task 2"]


async def test_a_loop_that_ends_leaves_nothing_silent(caplog: pytest.LogCaptureFixture) -> None:
    """The timer went with its loop."""
    limited = LimitedLog(log, every=0.02)

    async def twice() -> None:
        limited.warning("task %d", 1)
        limited.warning("task %d", 2)

    await asyncio.to_thread(asyncio.run, twice())
    loop = asyncio.get_running_loop()
    began = loop.time()
    await until(lambda: over(loop.time() - began > 0.05), "its time is over")
    limited.warning("task %d", 3)
    assert lines(caplog) == ["task 1", "1 more in 0 s: task 2", "task 3"]


async def over(condition: bool) -> bool:
    return condition
