"""What became of a task, asked by its producer and by any other program, with real workers on every broker."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import (
    App,
    ConfigurationError,
    Handle,
    NoResult,
    TaskCancelled,
    TaskFailed,
    TaskNotFound,
    as_finished,
    gather_results,
)
from leveret.brokers import connect
from leveret.model import new_id
from tests.support import ledger_app
from tests.support.ledger_app import Size
from tests.support.waiting import PATIENCE, wait_until
from tests.support.waiting import until as until_true
from tests.support.workers import LEDGER_APP, Ledger, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from leveret import Status
    from tests.conftest import Place
    from tests.support.nodes import Node


@asynccontextmanager
async def producing(place: Place | Node) -> AsyncGenerator[App]:
    ledger_app.app.client.connect_to(place.url)
    try:
        yield ledger_app.app
    finally:
        await ledger_app.app.close()


def let(ledger: Ledger, text: str, step: int) -> None:
    """Have a task of `steps` go on."""
    ledger.path.with_name(f"{ledger.path.name}.{text}.{step}").touch()


async def until(handle: Handle[Any], *states: str) -> Status:
    async with asyncio.timeout(PATIENCE):
        async for status in handle.updates():
            if status.state in states:
                return status
    raise AssertionError(f"the task ended without {states}")


async def test_results_come_back_typed(place: Place, ledger: Ledger) -> None:
    """To who enqueued it, to another program by its id, many at once and as they finish; again, if asked again."""
    with Worker(place.url, ledger).ready():
        async with producing(place) as app:
            handle = await ledger_app.measure.enqueue(3, 4)
            assert await handle.result(PATIENCE) == Size(3, 4)
            assert (await handle.status()).state == "succeeded"
            handles = await ledger_app.measure.enqueue_many([(number, 0) for number in range(50)])
            assert await gather_results(handles, timeout=PATIENCE) == [Size(number, 0) for number in range(50)]
            finished = [one.id async for one in as_finished([*handles, handle], timeout=PATIENCE)]
            assert sorted(finished) == sorted(one.id for one in [*handles, handle])
        other = App(place.url)
        assert await other.handle(handle.id).result(PATIENCE) == {"width": 3, "height": 4}
        await other.close()
        async with producing(place) as app:
            assert await ledger_app.measure.handle(handle.id).result(PATIENCE) == Size(3, 4)
            assert await app.handle(handle.id).result(PATIENCE) == Size(3, 4)
            with pytest.raises(TaskNotFound, match="nothing is known of task"):
                await app.handle("0" * 32).status()
            with pytest.raises(TaskNotFound, match="nothing is known of task"):
                await app.handle("0" * 32).result(PATIENCE)


async def test_failures_come_back_with_their_traceback(place: Place, ledger: Ledger) -> None:
    with Worker(place.url, ledger).ready():
        async with producing(place):
            dead = await ledger_app.give_up.enqueue("x")
            with pytest.raises(TaskFailed, match=f"task give_up {dead.id} is dead: gave up: x") as caught:
                await dead.result(PATIENCE)
            assert "raise Dead" in caught.value.traceback
            assert "raise Dead" in "".join(caught.value.__notes__)
            retried = await ledger_app.not_now.enqueue("y")
            status = await until(retried, "retrying")
            assert (status.attempt, status.error) == (2, "leveret.Retry: not now")
            assert status.due is not None
            await retried.result(PATIENCE)
            killed = await ledger_app.kill_the_child.enqueue("z")
            with pytest.raises(TaskFailed, match=r"was killed by SIGKILL; attempt 3 of 3 failed"):
                await killed.result(PATIENCE)
            with pytest.raises(TaskFailed, match="gave up"):
                await gather_results([retried, dead], timeout=PATIENCE)


async def test_results_that_cannot_be_kept(place: Place, ledger: Ledger) -> None:
    """The task has succeeded all the same, and whoever asks is told why there is nothing to show."""
    with Worker(place.url, ledger).ready() as worker:
        async with producing(place):
            large = await ledger_app.large.enqueue(1024 * 1024)
            with pytest.raises(NoResult, match=r"is 1048578 bytes, over the limit of 1048576; store it elsewhere"):
                await large.result(PATIENCE)
            assert len(await (await ledger_app.large.enqueue(1024 * 1024 - 2)).result(PATIENCE)) == 1024 * 1024 - 2
            strange = await ledger_app.strange.enqueue()
            with pytest.raises(NoResult, match=r"the result of task 'strange' is a object"):
                await strange.result(PATIENCE)
            silent = await ledger_app.silent.enqueue("s")
            ledger.wait_for("said s")
            with pytest.raises(ConfigurationError, match="store_result=False"):
                await silent.result(PATIENCE)
        worker.wait_for("succeeded, and its result is not kept", 2)


async def test_progress_is_followed(place: Place, ledger: Ledger) -> None:
    """From a coroutine and from a thread; a reader that comes late gets the latest."""
    with Worker(place.url, ledger).ready():
        async with producing(place) as app:
            for task in (ledger_app.steps, ledger_app.steps_in_thread):
                text = task.name
                handle = await task.enqueue(text, 3)
                seen = []
                async with asyncio.timeout(PATIENCE):
                    async for status in handle.updates():
                        if status.progress is not None and status.progress not in seen:
                            seen.append(status.progress)
                            if len(seen) == 2:
                                late = await app.handle(handle.id).status()
                                assert late.progress == status.progress
                                assert late.state == "running"
                                assert late.started_at is not None
                        if status.state in ("running", "queued"):
                            let(ledger, text, len(seen))
                assert [progress.done for progress in seen] == [1, 2, 3]
                assert seen[0].total == 3
                assert await handle.result() == text


async def test_what_waits_is_cancelled_and_never_runs(place: Place, ledger: Ledger) -> None:
    async with producing(place):
        ready = await ledger_app.say.enqueue("ready")
        delayed = await ledger_app.say.options(delay=1).enqueue("delayed")
        stays = await ledger_app.say.enqueue("stays")
        for handle in (ready, delayed):
            assert (await until(handle, "queued", "delayed")).attempt == 1
            assert (await handle.cancel()).state == "cancelled"
            with pytest.raises(TaskCancelled, match="cancelled before it ran"):
                await handle.result(PATIENCE)
        with Worker(place.url, ledger).ready():
            await stays.result(PATIENCE)
            again = await ledger_app.say.options(id=ready.id).enqueue("again") if place.node is None else stays
            await again.result(PATIENCE)
            await asyncio.sleep(1.2)  # the delayed one would run now
    assert ledger.count("said ready") == ledger.count("said delayed") == 0


async def test_what_runs_is_cancelled(place: Place, ledger: Ledger) -> None:
    """A coroutine where it awaits, a thread at its next check; one that waits in the worker does not begin."""
    with Worker(place.url, ledger, "--concurrency", "2", "--prefetch", "10").ready():
        async with producing(place):
            coroutine = await ledger_app.pause.enqueue("c", 600)
            thread = await ledger_app.steps_in_thread.enqueue("t", 2)
            waits = await ledger_app.say.enqueue("waits")
            await until(coroutine, "running")
            await until(thread, "running")
            for handle in (waits, coroutine, thread):
                status = await handle.cancel(timeout=PATIENCE)
                assert status.state == "cancelled", status
                when = "before it ran" if handle is waits else "while it ran"
                assert status.error == f"cancelled {when}"
            after = await ledger_app.measure.enqueue(1, 1)
            await after.result(PATIENCE)
            late = await after.cancel()
            assert late.state == "succeeded"
    assert ledger.count("said waits") == ledger.count("end c") == 0
    assert ledger.count("start c") == 1


async def test_what_keeps_no_result_is_cancelled_too(place: Place, ledger: Ledger) -> None:
    """Though RabbitMQ knows nothing of it, and says so."""
    async with producing(place):
        silent = await ledger_app.silent.enqueue("s")
        if place.node is None:
            assert (await silent.cancel()).state == "cancelled"
        else:
            with pytest.raises(TaskNotFound, match=r"store_result=False.*if it waits, it will not run"):
                await silent.cancel()
        with Worker(place.url, ledger).ready():
            after = await ledger_app.measure.enqueue(1, 1)
            await after.result(PATIENCE)
    assert ledger.count("said s") == 0


async def test_a_status_outlives_its_worker(place: Place, ledger: Ledger) -> None:
    """The worker is killed: the task is queued again, runs elsewhere, and who follows sees all of it."""
    async with producing(place):
        with Worker(place.url, ledger).ready() as first:
            handle = await ledger_app.steps.enqueue("s", 1)
            await until(handle, "running")
            first.kill_group()
        following = asyncio.ensure_future(handle.result(PATIENCE))
        with Worker(place.url, ledger).ready():
            let(ledger, "s", 0)
            assert await following == "s"
        with Worker(place.url, ledger).ready() as second:
            paused = await ledger_app.pause.enqueue("p", 600)
            await until(paused, "running")
            second.signal(signal.SIGTERM)
            second.wait_for("stopping")
            second.signal(signal.SIGTERM)
            second.exit_code()
            assert (await until(paused, "queued")).attempt == 1


async def test_results_outlive_the_broker(node: Node, ledger: Ledger) -> None:
    """A node that is killed: results are there afterwards, and who waits goes on waiting, and gets what comes."""
    with Worker(node.url, ledger).ready():
        async with producing(node):
            done = await ledger_app.measure.enqueue(1, 2)
            await done.result(PATIENCE)
            waits = await ledger_app.steps.enqueue("w", 1)
            await until(waits, "running")
            following = asyncio.ensure_future(waits.result(60))
            await asyncio.to_thread(node.restart)
            assert await ledger_app.measure.handle(done.id).result(PATIENCE) == Size(1, 2)
            let(ledger, "w", 0)
            assert await following == "w"


async def test_a_worker_begins_although_nobody_can_publish(node: Node, ledger: Ledger) -> None:
    """A memory alarm: only workers can end it, so they must not wait for it before they take what is there."""
    async with producing(node):
        cancelled = await ledger_app.say.enqueue("cancelled")
        await ledger_app.say.enqueue("stays")
        assert (await cancelled.cancel()).state == "cancelled"
    node.ctl("set_vm_memory_high_watermark", "absolute", "1MB")
    try:
        with Worker(node.url, ledger) as worker:
            ledger.wait_for("said stays")
            worker.wait_for("cancelled tasks could not all be read")
            assert worker.output.count("trying again") == 0
    finally:
        node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
    assert ledger.count("said cancelled") == 0


async def test_a_task_is_known_at_once(place: Place) -> None:
    """To another program too, that asks as soon as it has the id."""
    other = App(place.url)
    async with producing(place):
        for _ in range(5):
            handle = await ledger_app.say.enqueue("a")
            assert (await other.handle(handle.id).status()).state == "queued"
            handle = await ledger_app.say.options(id=f"my own {new_id()}").enqueue("a")
            assert (await other.handle(handle.id).status()).state == "queued"
    await other.close()


def test_without_an_event_loop(place: Place, ledger: Ledger) -> None:
    ledger_app.app.client.connect_to(place.url)
    try:
        with Worker(place.url, ledger).ready():
            handle = ledger_app.measure.enqueue_sync(1, 2)
            assert ledger_app.app.wait(handle.result(PATIENCE)) == Size(1, 2)
            assert ledger_app.app.wait(handle.status()).state == "succeeded"
    finally:
        ledger_app.app.close_sync()


def test_the_command_line_tells(place: Place, ledger: Ledger) -> None:
    url = ("--url", place.url)
    assert "nothing is known of task 'never'" in leveret("status", "never", *url, fails=True)
    done = leveret("enqueue", LEDGER_APP, "measure", "1", "2", *url).strip()
    dead = leveret("enqueue", LEDGER_APP, "give_up", "x", *url).strip()
    waits = leveret("enqueue", LEDGER_APP, "pause", "w", "600", *url).strip()
    wait_until(lambda: "queued     pause  on work  since" in leveret("status", waits, *url), "it is known to be queued")
    assert "is queued; wait for it with --wait" in leveret("result", waits, *url, fails=True)
    assert "cancelled before it ran" in leveret("cancel", waits, *url)
    with Worker(place.url, ledger).ready():
        assert leveret("result", done, "--wait", *url) == '{"width":1,"height":2}\n'
        failed = leveret("result", dead, "--timeout", "30", *url, fails=True)
    assert "raise Dead" in failed
    assert f"leveret: task give_up {dead} is dead: gave up: x" in failed
    shown = leveret("status", dead, "--follow", *url)
    assert shown.startswith("dead       give_up  on work  attempt 1  by ")
    assert "  gave up: x\n" in shown
    (line,) = leveret("status", done, "--json", "--follow", *url).splitlines()
    assert msgspec.json.decode(line)["result"] == {"width": 1, "height": 2}
    assert leveret("cancel", done, *url, fails=True) == ""
    assert "succeeded" in leveret("status", done, "--app", LEDGER_APP, *url)


async def test_a_dead_letter_that_dies_again_at_once_is_dead(place: Place, ledger: Ledger) -> None:
    """Whoever put it back has its word before the worker has one."""
    async with producing(place) as app:
        with Worker(place.url, ledger):
            handle = await ledger_app.give_up.enqueue("x")
            await until(handle, "dead")
            broker = connect(place.url)
            try:
                assert await broker.dead_letters.retry("work", [handle.id]) == [handle.id]
                await until_true(lambda: broker.dead_letters.read("work", limit=1), "it is dead again")
            finally:
                await broker.close()
        status = await handle.status()
        assert (status.state, status.error) == ("dead", "gave up: x")
        assert [moment.state for moment in status.history if moment.state != "running"][-2:] == ["dead", "queued"]
        assert await app.client.statuses([handle.id]) == [status]
