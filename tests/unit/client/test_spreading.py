"""``enqueue_many(..., over=60)``: many calls, each with a time of its own."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError
from leveret.model.durations import MAX_DELAY
from tests.support.outbox import Outbox

if TYPE_CHECKING:
    from pathlib import Path

CALLS = [(number,) for number in range(4)]


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


def offsets(outbox: Outbox) -> list[float | None]:
    """When each is due, after the first one was enqueued (seconds)."""
    now = outbox.sent[0].enqueued_at
    assert now is not None
    return [None if one.due is None else round(one.due - now, 3) for one in outbox.sent]


async def test_each_is_due_a_part_later_than_the_one_before(outbox: Outbox) -> None:
    @outbox.task
    async def say(number: int) -> None: ...

    handles = await say.enqueue_many(CALLS, over=60)
    assert offsets(outbox) == [None, 15.0, 30.0, 45.0]
    assert [one.id for one in outbox.sent] == [one.id for one in handles]


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        (timedelta(minutes=1), [None, 15.0, 30.0, 45.0]),
        (0.001, [None, 0.0, 0.001, 0.001]),
        (0, [None] * 4),
        (None, [None] * 4),
    ],
)
async def test_the_time_may_be_of_any_length(outbox: Outbox, over: Any, expected: list[float | None]) -> None:
    @outbox.task
    async def say(number: int) -> None: ...

    await say.enqueue_many(CALLS, over=over)
    assert offsets(outbox) == pytest.approx(expected, abs=0.001) if over == 0.001 else offsets(outbox) == expected


async def test_it_begins_when_a_delay_says(outbox: Outbox) -> None:
    @outbox.task
    async def say(number: int) -> None: ...

    await say.options(delay=100).enqueue_many(CALLS, over=8)
    assert offsets(outbox) == [100.0, 102.0, 104.0, 106.0]
    outbox.sent.clear()
    moment = datetime.now(UTC) + timedelta(hours=1)
    await say.options(at=moment).enqueue_many(CALLS[:2], over=8)
    assert [one.due for one in outbox.sent] == [moment.timestamp(), moment.timestamp() + 4.0]


async def test_one_call_or_none(outbox: Outbox) -> None:
    @outbox.task
    async def say(number: int) -> None: ...

    assert await say.enqueue_many([], over=60) == []
    await say.enqueue_many(CALLS[:1], over=60)
    assert offsets(outbox) == [None]


async def test_bad_values_are_refused_and_nothing_is_sent(outbox: Outbox) -> None:
    @outbox.task
    async def say(number: int) -> None: ...

    for wrong in (-1, "60", float("nan"), float("inf"), MAX_DELAY + 1, True):
        with pytest.raises(ConfigurationError, match="over"):
            await say.enqueue_many(CALLS, over=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="more than a year"):
        await say.options(delay=MAX_DELAY - 10).enqueue_many(CALLS, over=60)
    with pytest.raises(ConfigurationError, match="expired before they are due"):
        await say.options(expires=30).enqueue_many(CALLS, over=60)
    await say.options(expires=45).enqueue_many(CALLS, over=60)
    assert len(outbox.sent) == 4


def test_without_an_event_loop(tmp_path: Path) -> None:
    app = App(f"sqlite:///{tmp_path / 'x.db'}")

    @app.task
    def say(number: int) -> None: ...

    began = time.time()
    app.wait(say.enqueue_many(CALLS, over=600))

    async def delayed() -> list[float]:
        found = await app.client.broker.queues.peek("default", "delayed", limit=9)
        return [one.due - began for one in found if one.due is not None]

    assert app.wait(delayed()) == pytest.approx([150.0, 300.0, 450.0], abs=30.0)
    app.close_sync()
