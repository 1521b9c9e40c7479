"""Schedules in code and as data: what a decorator and ``app.schedules`` take, and what they refuse."""

from __future__ import annotations

import json
import re
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from leveret import (
    App,
    ConfigurationError,
    InvalidArguments,
    NotSerializable,
    QueueNotFound,
    ScheduleNotFound,
    cron,
    every,
)
from leveret.brokers.memory import MemoryBroker
from leveret.model import Declare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret.model import Cron, Every, ScheduleRow


@pytest.fixture
def app() -> Iterator[App]:
    app = App("memory://")
    with ExitStack() as stack:
        stack.enter_context(app.client.enqueuing_to(MemoryBroker()))
        yield app


def scheduled(given: Any, name: str = "report") -> dict[str, Any]:
    """What an application's workers declare for a task with that ``schedule=``, by name."""
    app = App("memory://")

    @app.task(name=name, schedule=given)
    async def report(month: str = "last", *, force: bool = False) -> None: ...

    return {one.name: one for one in app.registry.schedules("shop:app")}


def body(schedule: Any) -> Any:
    return json.loads(schedule.message.body)


# In code


def test_one_has_the_tasks_name() -> None:
    (schedule,) = scheduled(every(minutes=5)).values()
    assert (schedule.name, schedule.origin, schedule.message.task) == ("report", "shop:app", "report")
    assert schedule.timing == every(minutes=5)
    assert body(schedule) == {"args": [], "kwargs": {}}


def test_none_and_nothing_are_no_schedules() -> None:
    assert scheduled(None) == scheduled([]) == scheduled({}) == {}


def test_several_are_numbered() -> None:
    found = scheduled([every(days=1), cron("0 7 * * *"), every(hours=1)])
    assert list(found) == ["report", "report-2", "report-3"]
    assert str(found["report-2"].timing) == "0 7 * * * (UTC)"


def test_a_dict_names_them() -> None:
    found = scheduled({"morning": cron("0 7 * * *").with_args("this"), "evening": every(days=1).with_args(force=True)})
    assert body(found["morning"]) == {"args": ["this"], "kwargs": {}}
    assert body(found["evening"]) == {"args": [], "kwargs": {"force": True}}
    # The arguments are in the message; two with others are the same timing.
    assert found["morning"].timing == cron("0 7 * * *")


@pytest.mark.parametrize(
    "given",
    [
        "0 7 * * *",
        300,
        timedelta(minutes=5),
        [every(minutes=5), "0 7 * * *"],
        {"nightly": "0 2 * * *"},
        {"nightly": [every(minutes=5)]},
        (60,),
        cron,
        object(),
    ],
)
def test_what_says_nothing_of_when_is_refused(given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"task 'report': schedule has .*; it must be cron\('0 7 \* \* \*'\)"):
        scheduled(given)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "é" * 200, "x" * 231])
def test_a_name_must_begin_an_id(name: str) -> None:
    with pytest.raises(ConfigurationError, match="must be printable text of 1 to"):
        scheduled({name: every(minutes=5)})


@pytest.mark.parametrize(
    ("timing", "said"),
    [
        (every(days=1).with_args("a", "b"), "too many positional arguments"),
        (every(days=1).with_args(mouth="last"), "mouth"),
        (every(days=1).with_args(7), "does not fit str"),
    ],
)
def test_arguments_must_fit_the_task(timing: Cron | Every, said: str) -> None:
    with pytest.raises(InvalidArguments, match=re.escape(said)):
        scheduled(timing)


def test_arguments_must_be_data() -> None:
    with pytest.raises((NotSerializable, InvalidArguments)):
        scheduled(every(days=1).with_args(object()))


def test_a_task_that_needs_arguments_gets_them() -> None:
    app = App("memory://")
    with pytest.raises(InvalidArguments, match="customer"):

        @app.task(schedule=every(days=1))
        async def sync(customer: int) -> None: ...

    assert not app.tasks, "it is not half registered"


def test_two_tasks_with_a_schedule_of_one_name() -> None:
    app = App("memory://")

    @app.task(schedule={"nightly": every(days=1)})
    async def first() -> None: ...

    with pytest.raises(ConfigurationError, match="two schedules are called 'nightly', of tasks 'first' and 'second'"):

        @app.task(schedule={"nightly": every(days=1)})
        async def second() -> None: ...

    assert [task.name for task in app.tasks] == ["first"]


def test_a_module_that_is_run_again_has_what_it_says_now() -> None:
    """A schedule that its decorator no longer gives is gone."""
    app = App("memory://")
    source = "@app.task(schedule=GIVEN)\nasync def report() -> None: ...\n"
    for given in ("{'a': every(days=1), 'b': every(days=2)}", "{'b': every(days=3)}"):
        code = compile(source.replace("GIVEN", given), "tasks.py", "exec")
        exec(code, {"app": app, "every": every, "__name__": "tasks"})
    (only,) = app.registry.schedules("x")
    assert (only.name, only.timing) == ("b", every(days=3))


def test_the_tasks_options_are_the_schedules() -> None:
    app = App("memory://")

    @app.task(queue="mail", priority=7, schedule=every(days=1))
    async def digest() -> None: ...

    (schedule,) = app.registry.schedules("x")
    assert (schedule.message.queue, schedule.message.priority) == ("mail", 7)


# As data


async def rows(app: App) -> dict[str, ScheduleRow]:
    return {row.name: row async for row in app.schedules}


async def test_put_pause_resume_trigger_and_remove(app: App) -> None:
    @app.task(queue="mail")
    async def digest(customer: int, *, short: bool = False) -> None: ...

    await app.schedules.put("digest:42", digest.call(42, short=True), cron("0 7 * * mon-fri", tz="Asia/Tokyo"))
    row = (await rows(app))["digest:42"]
    assert (row.schedule.origin, row.last, row.paused, row.schedule.message.queue) == (None, None, False, "mail")
    assert body(row.schedule) == {"args": [42], "kwargs": {"short": True}}
    assert row.next is not None
    assert row.next > time.time()

    await app.schedules.pause("digest:42")
    assert (await rows(app))["digest:42"].paused
    await app.schedules.resume("digest:42")
    assert not (await rows(app))["digest:42"].paused

    handle = await app.schedules.trigger("digest:42")
    assert handle.id.startswith("digest:42@")
    assert (await handle.status()).task == "digest"

    await app.schedules.remove("digest:42")
    assert await rows(app) == {}


async def test_put_again_changes_it_and_keeps_what_it_knows(app: App) -> None:
    @app.task
    async def digest(customer: int) -> None: ...

    await app.schedules.put("a", digest.call(1), every(days=1))
    before = (await rows(app))["a"]
    await app.schedules.pause("a")
    await app.schedules.put("a", digest.call(2), every(days=1))
    after = (await rows(app))["a"]
    assert body(after.schedule)["args"] == [2]
    assert (after.next, after.paused) == (before.next, True)


async def test_a_call_has_the_options_that_it_was_made_with(app: App) -> None:
    @app.task
    async def digest() -> None: ...

    await app.schedules.put("a", digest.options(queue="slow", priority=9, expires=60).call(), every(days=1))
    message = (await rows(app))["a"].schedule.message
    assert (message.queue, message.priority, message.expires_at) == ("slow", 9, 60)


@pytest.mark.parametrize("options", [{"id": "mine"}, {"delay": 5}])
async def test_options_of_one_enqueue_are_refused(app: App, options: dict[str, Any]) -> None:
    @app.task
    async def digest() -> None: ...

    with pytest.raises(ConfigurationError, match="are for one enqueue: leave them out"):
        await app.schedules.put("a", digest.options(**options).call(), every(days=1))


async def test_what_put_refuses(app: App) -> None:
    @app.task
    async def digest(customer: int) -> None: ...

    wrong: Any
    for wrong in (digest, 42, None, ("digest", 42)):
        with pytest.raises(ConfigurationError, match=r"is no call of a task; give it task\.call"):
            await app.schedules.put("a", wrong, every(days=1))
    for wrong in ("0 7 * * *", 300, None):
        with pytest.raises(ConfigurationError, match="says nothing of when"):
            await app.schedules.put("a", digest.call(1), wrong)
    with pytest.raises(ConfigurationError, match=r"leave with_args\(\.\.\.\) out"):
        await app.schedules.put("a", digest.call(1), every(days=1).with_args(2))
    for wrong in ("", "a\nb", 7, "x" * 300):
        with pytest.raises(ConfigurationError, match="must be printable text"):
            await app.schedules.put(wrong, digest.call(1), every(days=1))
    wrong = "not a number"
    with pytest.raises(InvalidArguments):
        await app.schedules.put("a", digest.call(wrong), every(days=1))
    assert await rows(app) == {}


async def test_the_codes_are_not_replaced_and_not_removed(app: App) -> None:
    @app.task(schedule=every(days=1))
    async def report() -> None: ...

    await app.client.broker.schedules.ask(Declare("shop:app", 1.0, app.registry.schedules("shop:app")))
    with pytest.raises(ConfigurationError, match=r"'report' is in the code of 'shop:app'.*another name"):
        await app.schedules.put("report", report.call(), every(days=2))
    with pytest.raises(ConfigurationError, match="remove it there, or pause it"):
        await app.schedules.remove("report")


@pytest.mark.parametrize("act", ["pause", "resume", "trigger", "remove"])
async def test_one_that_is_not_there(app: App, act: str) -> None:
    with pytest.raises(ScheduleNotFound, match="'nothing' does not exist; `leveret schedules` shows those that do"):
        await getattr(app.schedules, act)("nothing")


async def test_a_trigger_whose_queue_is_gone(app: App) -> None:
    @app.task(queue="mail")
    async def digest() -> None: ...

    await app.schedules.put("a", digest.call(), every(days=1))
    await app.client.broker.queues.delete("mail")
    with pytest.raises(QueueNotFound, match="mail"):
        await app.schedules.trigger("a")
