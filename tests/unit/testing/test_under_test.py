"""`leveret.testing.under_test`: an application on a memory broker, with time that a test moves and faults on demand."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from leveret import (
    App,
    BrokerUnavailable,
    ConfigurationError,
    Dead,
    EnqueueTimeout,
    InvalidArguments,
    Queue,
    QueueFull,
    Retry,
    TaskNotFound,
    current_task,
)
from leveret.model import DeadLettered, Retrying, Succeeded
from leveret.testing import AppUnderTest, TasksFailed, under_test

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from leveret.model import Header

seen: list[Any] = []
failing: list[Exception] = []
meeting = threading.Barrier(2)
app = App("amqp://nobody@127.0.0.1:1/", queues=[Queue("small", max_length=1)])


@app.task
async def note(text: str, times: int = 1) -> None:
    seen.extend([text] * times)
    if failing:
        raise failing.pop(0)


@app.task(queue="plain")
def note_in_a_thread(text: str) -> None:
    assert threading.current_thread() is not threading.main_thread()
    note.enqueue_sync(text)


@app.task
async def take(seconds: float) -> None:
    await asyncio.sleep(seconds)


@app.task(store_result=False)
async def silent(text: str) -> None:
    seen.append(text)


@app.task
async def call_again(times: int) -> None:
    seen.append(times)
    if times > 1:
        await call_again.enqueue(times - 1)


@app.task(max_attempts=3, backoff=60, queue="flaky")
async def flaky() -> None:
    seen.append(current_task().attempt)
    raise ConnectionError("the mail server is away")


@app.task(acknowledge="before")
async def once() -> None:
    seen.append("once")
    await note.enqueue("after once")


@app.task(queue="raw", default=True)
async def raw(body: bytes) -> None:
    seen.append(body)


@app.task
async def quits() -> None:
    raise SystemExit(3)


@app.task
def meets(at: dict[str, float]) -> None:
    """Two runs at the same time wait for each other."""
    seen.append(current_task().id)
    meeting.wait(timeout=at["most"])
    seen.append("end")


@pytest.fixture
def test() -> Iterator[AppUnderTest]:
    seen.clear()
    failing.clear()
    with under_test(app) as test:
        yield test


async def test_runs_what_is_ready_and_what_that_enqueues(test: AppUnderTest) -> None:
    await call_again.enqueue(3)
    runs = await test.drain()
    assert seen == [3, 2, 1]
    assert [(run.task, run.attempt, run.outcome) for run in runs] == [("call_again", 1, Succeeded(b"null"))] * 3
    assert await test.drain() == []
    assert test.runs == tuple(runs)


def test_without_a_loop(test: AppUnderTest) -> None:
    note.enqueue_sync("a")
    note_in_a_thread.enqueue_sync("b")
    assert len(test.drain_sync()) == 3
    assert seen == ["a", "b"]


async def test_a_thread_enqueues_while_a_loop_drains(test: AppUnderTest) -> None:
    """The synchronous door has a loop of its own."""
    await note_in_a_thread.enqueue("b")
    await test.drain()
    assert seen == ["b"]


def test_each_test_begins_empty_and_leaves_the_application_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "real.db"
    real = App(f"sqlite:///{file}")
    task = real.task(print)
    for _ in range(2):
        with under_test(real) as test:
            assert test.enqueued() == []
            task.enqueue_sync("a")
            assert len(test.enqueued(task)) == 1
    assert not file.exists()
    assert real.middleware == ()
    task.enqueue_sync("b")
    real.close_sync()
    assert file.exists()


def test_an_application_that_is_opened_and_closed(test: AppUnderTest) -> None:
    async def program() -> None:
        async with app:
            await note.enqueue("a")

    asyncio.run(program())
    test.drain_sync()
    assert seen == ["a"]


async def test_a_failed_run_raises_what_its_task_raised(test: AppUnderTest) -> None:
    await note.enqueue("a")
    await note.enqueue("b")
    failing.append(ValueError("no such file"))
    with pytest.raises(TasksFailed, match="1 of 2 runs failed") as caught:
        await test.drain()
    (error,) = caught.value.exceptions
    assert str(error) == "no such file"
    assert error.__traceback__ is not None
    assert "in task 'note', attempt 1" in error.__notes__[0]
    assert "next try in" in error.__notes__[0]
    assert seen == ["a", "b"]


async def test_expected_failures_are_runs_like_others(test: AppUnderTest) -> None:
    await flaky.enqueue()
    for attempt in (1, 2):
        (run,) = await test.drain(expect=ConnectionError)
        assert isinstance(run.outcome, Retrying)
        assert isinstance(run.error, ConnectionError)
        assert run.attempt == attempt
        assert 0 < test.clock.skip() <= 120
    (run,) = await test.drain(expect=ConnectionError)
    assert isinstance(run.outcome, DeadLettered)
    assert seen == [1, 2, 3]
    (letter,) = await test.dead_letters("flaky")
    assert "attempt 3 of 3 failed" in letter.reason
    assert await test.dead_letters() == [letter]
    assert test.clock.skip() == 0.0


async def test_a_retry_that_a_task_asks_for_is_no_failure(test: AppUnderTest) -> None:
    failing.append(Retry(delay=30))
    await note.enqueue("a")
    (run,) = await test.drain()
    assert run.outcome == Retrying("leveret.Retry: the task asked to be tried again", run.outcome.traceback, 30)  # type: ignore[union-attr]
    test.clock.advance(29)
    assert await test.drain() == []
    test.clock.advance(1.1)
    assert len(await test.drain()) == 1


async def test_a_dead_task_is_a_failure_unless_expected(test: AppUnderTest) -> None:
    failing.extend([Dead("not a picture"), Dead("not a picture")])
    await note.enqueue("a")
    with pytest.raises(TasksFailed):
        await test.drain()
    await note.enqueue("b")
    await test.drain(expect=Dead)
    assert [letter.reason for letter in await test.dead_letters()] == ["not a picture"] * 2


async def test_a_task_that_ends_its_process_fails(test: AppUnderTest) -> None:
    await quits.enqueue()
    with pytest.raises(TasksFailed) as caught:
        await test.drain()
    assert "SystemExit" in str(caught.value.exceptions[0])


async def test_a_delay_passes_when_the_clock_does(test: AppUnderTest) -> None:
    await note.options(delay=3600).enqueue("later")
    await note.options(at=datetime.now(UTC) + timedelta(hours=2)).enqueue("latest")
    assert await test.drain() == []
    test.clock.advance(timedelta(minutes=59))
    assert await test.drain() == []
    test.clock.advance(60)
    await test.drain()
    assert seen == ["later"]
    await note.options(delay=10).enqueue("from now")
    assert await test.drain() == []
    assert test.clock.skip() == pytest.approx(10, abs=1)
    await test.drain()
    assert seen == ["later", "from now"]
    test.clock.advance(3600)
    await test.drain()
    assert seen == ["later", "from now", "latest"]


async def test_a_task_expires_by_the_clock(test: AppUnderTest) -> None:
    await note.options(expires=60).enqueue("in time")
    await test.drain()
    await note.options(expires=60).enqueue("too late")
    test.clock.advance(61)
    with pytest.raises(TasksFailed, match="1 of 1") as caught:
        await test.drain()
    assert "it expired" in str(caught.value.exceptions[0])
    assert seen == ["in time"]


async def test_a_task_sees_its_age_and_not_the_clock(test: AppUnderTest) -> None:
    @test.app.task(name="aged")
    async def aged() -> None:
        enqueued_at = current_task().enqueued_at
        assert enqueued_at is not None
        seen.append(time.time() - enqueued_at)

    try:
        await aged.options(delay=500).enqueue()
        test.clock.skip()
        await test.drain()
    finally:
        del test.app.registry.tasks["aged"]
    assert seen == [pytest.approx(500, abs=5)]


async def test_results_stay_however_far_the_clock_moves(test: AppUnderTest) -> None:
    first = await note.enqueue("first")
    await test.drain()
    later = await note.options(delay=7200).enqueue("later")
    last = await note.options(delay=20_000).enqueue("last")
    test.clock.advance(7200)
    await test.drain()
    assert (await last.cancel()).state == "cancelled"
    for handle in (first, later):
        assert (await handle.status()).state == "succeeded"
        await handle.result(1)


async def test_what_keeps_no_result_is_cancelled(test: AppUnderTest) -> None:
    """Nothing is known of it once it has ended: that is said at once."""
    waits = await silent.enqueue("waits")
    assert (await waits.cancel()).state == "cancelled"
    ended = await silent.enqueue("ended")
    await test.drain()
    with pytest.raises(TaskNotFound, match=rf"{ended.id}.*store_result=False.*if it waits, it will not run"):
        await ended.cancel()
    assert seen == ["ended"]


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_time_only_moves_forward(test: AppUnderTest, seconds: float) -> None:
    with pytest.raises(ConfigurationError, match="it must be 0 or more seconds"):
        test.clock.advance(seconds)


async def test_assert_enqueued(test: AppUnderTest) -> None:
    await note.enqueue("a", times=2)
    await note.enqueue("b")
    await note.options(queue="other", delay=30, priority=7, id="b-2").enqueue("b")
    await raw.enqueue(b"body")
    assert test.assert_enqueued(note, "a", 2).arguments == {"text": "a", "times": 2}
    test.assert_enqueued(note, "b", times=1)
    assert test.assert_enqueued(note, "b").id == "b-2"
    test.assert_enqueued(raw, b"body")
    test.expecting(count=2).assert_enqueued(note, "b")
    test.expecting(queue="other", delay=timedelta(seconds=30), priority=7, id="b-2").assert_enqueued(note, "b")
    test.expecting(count=0).assert_enqueued(note, "c")
    await test.drain()
    test.assert_enqueued(note, "a", 2)
    assert [one.arguments for one in test.enqueued(raw)] == [b"body"]
    assert len(test.enqueued()) == 4


async def test_what_one_enqueue_says_of_its_run_is_looked_at(test: AppUnderTest) -> None:
    headers: dict[str, Header] = {"tenant": "acme", "trace": 7}
    options = note.options(timeout=2.5, max_attempts=1, store_result=False, headers=headers)
    await options.enqueue("a")
    one = test.expecting(timeout=timedelta(seconds=2.5), max_attempts=1, store_result=False).assert_enqueued(note, "a")
    test.expecting(headers={"tenant": "acme"}).assert_enqueued(note, "a")
    assert (one[0].options, one[0].headers) == (
        {"timeout": 2.5, "max_attempts": 1, "store_result": False},
        headers,
    )
    for wrong in (
        test.expecting(timeout=2),
        test.expecting(max_attempts=2),
        test.expecting(store_result=True),
        test.expecting(headers={"tenant": "b"}),
    ):
        with pytest.raises(AssertionError) as caught:
            wrong.assert_enqueued(note, "a")
        assert "timeout 2.5, max_attempts 1, store_result False, headers {'tenant': 'acme', 'trace': 7}" in str(
            caught.value
        )


async def test_what_was_enqueued_instead_is_listed(test: AppUnderTest) -> None:
    with pytest.raises(AssertionError, match="Nothing was enqueued in this test"):
        test.assert_enqueued(note, "a")
    await note.options(delay=30, expires=90, priority=3).enqueue("b")
    await raw.enqueue(b"body")
    with pytest.raises(AssertionError) as caught:
        test.expecting(queue="mail", count=2).assert_enqueued(note, "a")
    assert str(caught.value).splitlines() == [
        "note(text='a', times=1) with queue 'mail' was enqueued 0 times, and 2 times was expected.",
        "Enqueued in this test, the oldest first:",
        "  note(text='b', times=1) on 'default', in 30 s, expires in 90 s, priority 3",
        "  raw(b'body') on 'raw'",
    ]
    with pytest.raises(AssertionError, match="with delay 10"):
        test.expecting(delay=10).assert_enqueued(note, "b")


def test_arguments_that_do_not_fit_are_a_mistake_of_the_test(test: AppUnderTest) -> None:
    with pytest.raises(InvalidArguments):
        test.assert_enqueued(note, "a", wrong=1)  # type: ignore[call-arg]


async def test_crash_before_settle(test: AppUnderTest) -> None:
    """The same task and the same attempt run again, and the neighbours run once."""
    test.faults.crash_before_settle(note)
    handle = await note.enqueue("a")
    await note.enqueue("b")
    runs = await test.drain()
    assert seen == ["a", "a", "b"]
    assert [(run.id == handle.id, run.attempt, run.kept) for run in runs] == [
        (True, 1, False),
        (True, 1, True),
        (False, 1, True),
    ]


async def test_a_crash_loses_a_failure_too(test: AppUnderTest) -> None:
    test.faults.crash_before_settle(note, times=2)
    failing.append(ValueError("lost with its worker"))
    await note.enqueue("a")
    assert [run.kept for run in await test.drain()] == [False, False, True]


async def test_duplicate_delivery(test: AppUnderTest) -> None:
    await note.enqueue("a")
    test.faults.duplicate_delivery(note)
    runs = await test.drain()
    assert seen == ["a", "a"]
    assert runs[0].id == runs[1].id


async def test_duplicates_at_the_same_time(test: AppUnderTest) -> None:
    test.faults.duplicate_delivery(meets)
    await meets.enqueue({"most": 20.0})
    await test.drain(concurrency=2)
    assert seen[0] == seen[1]
    assert seen[2:] == ["end", "end"]


async def test_lost_connection(test: AppUnderTest, caplog: pytest.LogCaptureFixture) -> None:
    """Two workers run it at the same time, and the first outcome does not count."""
    test.faults.lost_connection(meets)
    await meets.enqueue({"most": 20.0})
    await note.options(priority=0).enqueue("neighbour")
    with caplog.at_level(logging.WARNING, "leveret.worker"):
        runs = await test.drain()
    assert seen[0] == seen[1]
    assert sorted(seen[2:]) == ["end", "end", "neighbour"]
    assert sorted(run.kept for run in runs if run.task == "meets") == [False, True]
    assert "its delivery was lost" in caplog.text


async def test_enqueue_fails(test: AppUnderTest) -> None:
    test.faults.enqueue_fails(note)
    with pytest.raises(BrokerUnavailable, match="enqueue_fails"):
        await note.enqueue("a")
    assert test.enqueued() == []
    await note.enqueue("b")
    await test.drain()
    assert seen == ["b"]


async def test_lost_confirm(test: AppUnderTest) -> None:
    test.faults.lost_confirm(note)
    with pytest.raises(EnqueueTimeout) as caught:
        await note.enqueue("a")
    assert caught.value.ids == (test.assert_enqueued(note, "a").id,)
    await test.drain()
    assert seen == ["a"]


def test_a_fault_that_did_not_happen_fails_the_test() -> None:
    with (
        pytest.raises(AssertionError, match=r"did not happen: lost_connection of 'note' \(2 times\)"),
        under_test(app) as test,
    ):
        test.faults.lost_connection(note, times=2)
    with pytest.raises(ValueError, match="0 times"), under_test(app) as test:
        test.faults.lost_connection(note, times=0)


async def test_at_most_once(test: AppUnderTest) -> None:
    """Nothing of it is in the queue while it runs, and what it enqueues is run all the same."""
    await once.enqueue()
    await test.drain()
    assert seen == ["once", "after once"]


async def test_a_queue_that_comes_later_is_drained(test: AppUnderTest) -> None:
    @test.app.task(name="spreads")
    async def spreads() -> None:
        await note.options(queue="new").enqueue("in a new queue")

    try:
        await spreads.enqueue()
        await test.drain()
    finally:
        del test.app.registry.tasks["spreads"]
    assert seen == ["in a new queue"]


async def test_what_is_handed_back_before_it_ran_is_no_run(test: AppUnderTest) -> None:
    """A worker holds more than it runs while tasks are short, and gives it back when one is long."""
    await take.enqueue_many((seconds,) for seconds in (*[0.002] * 60, 0.3, *[0.0] * 40))
    runs = await test.drain()
    assert [type(run.outcome) for run in runs] == [Succeeded] * 101
    assert len({run.id for run in runs}) == 101


async def test_a_task_that_enqueues_itself_for_ever(test: AppUnderTest) -> None:
    await call_again.enqueue(1_000)
    with pytest.raises(RuntimeError, match="enqueue itself for ever"):
        await test.drain(at_most=20)
    assert len(seen) <= 22


@pytest.mark.usefixtures("test")
async def test_limits_of_queues_hold() -> None:
    await note.options(queue="small").enqueue("a")
    with pytest.raises(QueueFull):
        await note.options(queue="small").enqueue("b")


def test_nothing_to_drain(test: AppUnderTest) -> None:
    assert test.drain_sync() == []
    assert test.dead_letters_sync() == []


async def test_a_run_has_its_result() -> None:
    """As whoever waits for it gets it; readable, too."""
    app = App()

    @app.task
    def add(a: int, b: int) -> int:
        return a + b

    @app.task
    def pair() -> Any:
        return (1, 2)

    @app.task(store_result=False)
    async def when() -> datetime:
        return datetime(2026, 1, 31, tzinfo=UTC)

    @app.task(max_attempts=1)
    def fail() -> int:
        raise ValueError("no")

    with under_test(app) as test:
        await add.enqueue(1, 2)
        await pair.enqueue()
        await when.enqueue()
        await fail.enqueue()
        runs = await test.drain(expect=ValueError)
    assert [run.result for run in runs] == [3, [1, 2], datetime(2026, 1, 31, tzinfo=UTC), None]
    assert "task='add'" in repr(runs[0])
    assert "result=3" in repr(runs[0])
    assert "error=ValueError('no')" in repr(runs[3])
    assert all("\n" not in repr(run) and len(repr(run)) < 300 for run in runs)
