"""Right and wrong uses of the public interface, for a type checker: every wrong one must be an error.

Each ``type: ignore`` names the error that is due on its line; mypy reports an ignore that is not needed. Nothing here
is run.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_type

from leveret import (
    App,
    Chain,
    ChainHandle,
    CurrentTask,
    Handle,
    Limit,
    Limited,
    Queue,
    Rate,
    Retry,
    Step,
    by,
    cron,
    current_task,
    every,
)
from leveret.testing import AppUnderTest, Enqueued, Run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Sequence

    from leveret.model import Envelope

app = App("memory://", queues=[Queue("small", max_length=10)])


@app.task
async def coroutine(number: int, text: str = "") -> float:
    return number / len(text)


@app.task
def plain(number: int, *, exact: bool) -> list[str]:
    return [str(number), str(exact)]


@app.task(queue="small", acknowledge="before", max_attempts=None, backoff=0.5, retry_on=OSError)
async def configured(number: int) -> bytes:
    return bytes(number)


@app.task(name="other", default=True, give_up_on=(KeyError, ValueError), retry=lambda attempt, _: attempt * 2.0)
def configured_plain(body: bytes) -> None:
    print(body)


@app.task()
async def empty_parentheses(*numbers: int, **texts: str) -> None:
    print(numbers, texts)


class Service:
    async def method(self, number: int) -> str:
        return f"{self}{number}"


method = app.task(Service().method)


async def parameters_are_kept() -> None:
    await coroutine.enqueue(1)
    await coroutine.enqueue(1, "a")
    await coroutine.enqueue(number=1, text="a")
    await coroutine.enqueue("1")  # type: ignore[arg-type]
    await coroutine.enqueue()  # type: ignore[call-arg]
    await coroutine.enqueue(1, "a", 2)  # type: ignore[call-arg]
    await coroutine.enqueue(1, txt="a")  # type: ignore[call-arg]
    await coroutine.enqueue(1, text=2)  # type: ignore[arg-type]
    await coroutine.enqueue(1, number=1)  # type: ignore[misc]

    await plain.enqueue(1, exact=True)
    await plain.enqueue(1)  # type: ignore[call-arg]
    await plain.enqueue(1, "yes")  # type: ignore[call-arg, arg-type]
    await plain.enqueue(1, exact="yes")  # type: ignore[arg-type]

    await configured.enqueue(1)
    await configured.enqueue("1")  # type: ignore[arg-type]
    await configured.enqueue(1, 2)  # type: ignore[call-arg]

    await configured_plain.enqueue(b"")
    await configured_plain.enqueue("")  # type: ignore[arg-type]
    await configured_plain.enqueue(data=b"")  # type: ignore[call-arg]

    await empty_parentheses.enqueue(1, 2, 3, a="x", b="y")
    await empty_parentheses.enqueue(1, "2")  # type: ignore[arg-type]
    await empty_parentheses.enqueue(a=1)  # type: ignore[arg-type]

    await method.enqueue(1)
    await method.enqueue(Service(), 1)  # type: ignore[call-arg, arg-type]


def parameters_are_kept_without_a_loop() -> None:
    coroutine.enqueue_sync(1, text="a")
    coroutine.enqueue_sync("1")  # type: ignore[arg-type]
    coroutine.enqueue_sync()  # type: ignore[call-arg]
    coroutine.enqueue_sync(1, txt="a")  # type: ignore[call-arg]
    plain.enqueue_sync(1, exact=True)
    plain.enqueue_sync(1)  # type: ignore[call-arg]
    configured.enqueue_sync(b"")  # type: ignore[arg-type]
    configured_plain.enqueue_sync(1)  # type: ignore[arg-type]


def parameters_are_kept_by_a_call() -> None:
    plain(1, exact=True)
    plain(1)  # type: ignore[call-arg]
    coroutine("1")  # type: ignore[arg-type, unused-coroutine]


async def parameters_are_kept_by_options() -> None:
    later = coroutine.options(queue="small", delay=timedelta(seconds=5), expires=60)
    assert_type(await later.enqueue(1), Handle[float])
    await later.enqueue("1")  # type: ignore[arg-type]
    await later.enqueue()  # type: ignore[call-arg]
    coroutine.options(qeue="small")  # type: ignore[call-arg]
    coroutine.options("small")  # type: ignore[call-arg]
    coroutine.options(queue=1)  # type: ignore[arg-type]
    coroutine.options(delay="5")  # type: ignore[arg-type]
    coroutine.options(priority="5")  # type: ignore[arg-type]
    coroutine.options(id=5)  # type: ignore[arg-type]
    once = coroutine.options(timeout=timedelta(1), max_attempts=1, store_result=False, headers={"a": "b", "n": None})
    assert_type(await once.enqueue(1), Handle[float])
    debounced = coroutine.options(unique=by("number", on_conflict="replace"), debounce=5, max_wait=timedelta(minutes=1))
    assert_type(await debounced.enqueue(1), Handle[float])
    coroutine.options(on_conflict="again")  # type: ignore[arg-type]
    coroutine.options(debounce="5")  # type: ignore[arg-type]
    coroutine.options(timeout="5")  # type: ignore[arg-type]
    coroutine.options(max_attempts="5")  # type: ignore[arg-type]
    coroutine.options(store_result="no")  # type: ignore[arg-type]
    coroutine.options(headers={"a": [1]})  # type: ignore[dict-item]
    coroutine.options(headers=["a"])  # type: ignore[arg-type]


async def a_handle_carries_the_awaited_result() -> None:
    assert_type(await coroutine.enqueue(1), Handle[float])
    assert_type(await plain.enqueue(1, exact=True), Handle[list[str]])
    assert_type(await configured.enqueue(1), Handle[bytes])
    assert_type(await configured_plain.enqueue(b""), Handle[None])
    assert_type(await method.enqueue(1), Handle[str])
    assert_type(await coroutine.enqueue_many([(1,), (2, "a")]), list[Handle[float]])
    assert_type((await coroutine.enqueue(1)).id, str)
    wrong: Handle[int] = await coroutine.enqueue(1)  # type: ignore[assignment]
    print(wrong)


def a_handle_carries_the_awaited_result_without_a_loop() -> None:
    assert_type(coroutine.enqueue_sync(1), Handle[float])
    assert_type(plain.enqueue_sync(1, exact=True), Handle[list[str]])
    assert_type(configured.enqueue_sync(1), Handle[bytes])
    assert_type(configured_plain.enqueue_sync(b""), Handle[None])
    assert_type(app.wait(plain.enqueue_many([(1,)])), list[Handle[list[str]]])
    wrong: Handle[str] = plain.enqueue_sync(1, exact=True)  # type: ignore[assignment]
    print(wrong)


async def an_enqueue_is_awaited() -> None:
    forgotten: Handle[float] = coroutine.enqueue(1)  # type: ignore[assignment]
    print(forgotten)


def options_are_checked() -> None:
    app.task(acknowledge="never")  # type: ignore[call-overload]
    app.task(max_attempts="5")  # type: ignore[call-overload]
    app.task(qeue="small")  # type: ignore[call-overload]
    app.task(retry_on=OSError())  # type: ignore[call-overload]
    app.task(5)  # type: ignore[call-overload]
    app.task(retry=lambda: 5.0)  # type: ignore[misc, arg-type]
    App(queues=["small"])  # type: ignore[list-item]
    Queue("small", max_length="10")  # type: ignore[arg-type]
    Queue("small", kind="stream")  # type: ignore[arg-type]


class Promise:
    """Awaitable, and no coroutine."""

    def __await__(self) -> Generator[Any, None, int]:
        raise NotImplementedError


@app.task
def promising(number: int) -> Promise:
    raise NotImplementedError


async def a_call_gives_what_the_function_does() -> None:
    assert_type(plain(1, exact=True), list[str])
    running: Coroutine[Any, Any, float] = coroutine(1)
    assert_type(await coroutine(1), float)
    assert_type(await configured(1), bytes)
    assert_type(await coroutine.options(delay=timedelta(seconds=5))(1), float)
    assert_type(plain.options(priority=7)(1, exact=True), list[str])
    assert_type(await promising.enqueue(1), Handle[int])
    wrong: int = await coroutine(1)  # type: ignore[assignment]
    await plain(1, exact=True)  # type: ignore[misc]
    print(wrong, running)


def a_task_is_no_function_any_more() -> None:
    plain.no_such_attribute  # type: ignore[attr-defined]  # noqa: B018 - the mistake under test
    plain.delay(1, exact=True)  # type: ignore[attr-defined]


async def calls_of_many_are_checked() -> None:
    assert_type(await coroutine.enqueue_many([coroutine.call(1), coroutine.call(2, text="a")]), list[Handle[float]])
    assert_type(app.wait(plain.enqueue_many([plain.call(1, exact=True)])), list[Handle[list[str]]])
    await coroutine.enqueue_many([coroutine.call(1), (2, "a")])
    await coroutine.enqueue_many([coroutine.call("a", 5)])  # type: ignore[arg-type]
    await coroutine.enqueue_many([coroutine.call()])  # type: ignore[call-arg]
    await plain.enqueue_many([plain.call(1)])  # type: ignore[call-arg]
    await coroutine.enqueue_many([plain.call(1, exact=True)])  # type: ignore[list-item]
    await coroutine.enqueue_many([5])  # type: ignore[list-item]


def durations_are_numbers_or_timedeltas() -> None:
    soon = timedelta(minutes=5)
    app.task(timeout=soon, backoff=soon, max_backoff=soon)
    app.task(retry=lambda attempt, _: soon * attempt)
    app.task(retry_on=[OSError, KeyError], give_up_on={ValueError})
    App(enqueue_timeout=soon, keep_results=soon)
    Retry(delay=soon)
    app.task(timeout="5m")  # type: ignore[call-overload]
    app.task(backoff=datetime.now(UTC))  # type: ignore[call-overload]
    app.task(retry_on=["OSError"])  # type: ignore[list-item]
    Retry(delay="5")  # type: ignore[arg-type]
    coroutine.options(at=date(2030, 1, 1))  # type: ignore[arg-type]
    coroutine.options(expires=datetime.now(UTC))  # type: ignore[arg-type]


class Pool:
    size = 5


@asynccontextmanager
async def lifespan(app: App) -> AsyncGenerator[Pool]:
    print(app.url)
    yield Pool()


async def lifespan_without_its_decorator(app: App) -> AsyncGenerator[Pool]:
    print(app.url)
    yield Pool()


@asynccontextmanager
async def lifespan_of_something_else(number: int) -> AsyncGenerator[Pool]:
    print(number)
    yield Pool()


def a_lifespan_has_a_typed_value() -> None:
    App(lifespan=lifespan)
    App(lifespan=lifespan_without_its_decorator)  # type: ignore[arg-type]
    App(lifespan=lifespan_of_something_else)  # type: ignore[arg-type]
    task: CurrentTask[Pool] = current_task()
    assert_type(task.state.size, int)
    print(task.state.length)  # type: ignore[attr-defined]
    task.state = Pool()  # type: ignore[misc]
    assert_type(current_task().state, Any)


async def middleware(current: CurrentTask, inner: Callable[[], Awaitable[Any]]) -> Any:
    print(current.id, current.headers["tenant"])
    current.headers["tenant"] = "other"  # type: ignore[index]
    return await inner()


def thread_middleware(current: CurrentTask, inner: Callable[[], Any]) -> Any:
    print(current.id)
    return inner()


async def enqueue_middleware(
    envelopes: Sequence[Envelope], store: Callable[[Sequence[Envelope]], Awaitable[None]]
) -> None:
    envelopes[0].queue = "other"  # type: ignore[misc]
    envelopes[0].with_headers({"when": datetime.now(UTC)})  # type: ignore[dict-item]
    await store(
        [envelope.with_headers({"tenant": "acme", "try": 1, "ratio": 0.5, "no": None}) for envelope in envelopes]
    )


def middleware_has_three_kinds() -> None:
    App(middleware=[middleware], thread_middleware=[thread_middleware], enqueue_middleware=[enqueue_middleware])
    App(middleware=[lambda: None])  # type: ignore[list-item, misc]
    App(enqueue_middleware=[middleware])  # type: ignore[list-item]


async def assertions_take_the_arguments_of_their_task(test: AppUnderTest) -> None:
    assert_type(test.assert_enqueued(coroutine, 1, text="a"), Enqueued)
    assert_type(test.expecting(delay=timedelta(1), count=0).assert_enqueued(plain, 1, exact=True), list[Enqueued])
    test.assert_enqueued(coroutine, "1")  # type: ignore[arg-type]
    test.assert_enqueued(plain, 1)  # type: ignore[call-arg]
    test.expecting(queue="mail").assert_enqueued(coroutine, 1, txt="a")  # type: ignore[call-arg]
    test.expecting(deley=1)  # type: ignore[call-arg]
    assert_type(await test.drain(expect=(OSError, KeyError)), list[Run])
    await test.drain(expect="OSError")  # type: ignore[arg-type]
    test.faults.crash_before_settle("coroutine")  # type: ignore[arg-type]


@app.task(schedule=every(minutes=5, jitter=timedelta(seconds=20)))
async def scheduled(number: int = 1) -> float:
    return float(number)


app.task(schedule=[cron("0 7 * * *", tz="Asia/Tokyo"), every(timedelta(hours=1), overlap="allow")])(plain.function)
app.task(schedule={"nightly": cron("30 2 * * *", catch_up="none", grace=60).with_args("a")})(plain.function)
app.task(schedule="0 7 * * *")(plain.function)  # type: ignore[arg-type]
app.task(schedule=[300])(plain.function)  # type: ignore[list-item]
cron("0 7 * * *", catch_up="some")  # type: ignore[arg-type]
every(minutes=5, overlap="queue")  # type: ignore[arg-type]
every(minutes="5")  # type: ignore[arg-type]
cron()  # type: ignore[call-arg]


async def schedules_have_types() -> None:
    assert_type(await scheduled.enqueue(1), Handle[float])
    assert_type(CurrentTask.scheduled_for, datetime | None)
    await app.schedules.put("a", scheduled.call(1), every(minutes=5))
    await app.schedules.put("a", scheduled.call("1"), every(minutes=5))  # type: ignore[arg-type]
    await app.schedules.put("a", scheduled, every(minutes=5))  # type: ignore[arg-type]
    await app.schedules.put("a", scheduled.call(1), "0 7 * * *")  # type: ignore[arg-type]
    async for row in app.schedules:
        assert_type(row.next, float | None)
        row.paused = True  # type: ignore[misc]
    assert_type(await app.schedules.trigger("a"), Handle[Any])
    assert_type(await app.schedules.pause("a"), None)


stripe = app.limit("stripe", concurrency=20, rate=Rate(100, per=timedelta(minutes=1), burst=5))
tenants = app.limit("tenants", by=["tenant", "host"])


@app.task(limits=[stripe, tenants])
async def limited(tenant: str, host: str) -> None:
    raise Limited(stripe, for_=timedelta(seconds=30), reason=f"{tenant} {host}")


@app.task(limits=stripe)
async def limited_by_one() -> None:
    raise Limited("stripe", for_=30, reason="429")


async def limits() -> None:
    assert_type(stripe, Limit)
    await stripe.set(concurrency=None)
    await stripe.set(rate=Rate(5))
    await stripe.set(concurrency="5")  # type: ignore[arg-type]
    assert_type((await stripe.use()).waiting, int)
    await limited.options(limits=[]).enqueue("a", "b")
    await limited.options(limits=["stripe"]).enqueue("a", "b")  # type: ignore[list-item]
    app.limit("other", rate=5)  # type: ignore[arg-type]
    app.limit("other", concurrency="5")  # type: ignore[arg-type]
    raise Limited(stripe)  # type: ignore[call-arg]


async def chains_are_typed() -> None:
    step = plain.step(1, exact=True)
    assert_type(step, Step[list[str]])
    chain = coroutine.step(1) | plain.step(exact=True) | coroutine.step("a").immutable()
    assert_type(chain, Chain[float])
    handle = await chain.enqueue()
    assert_type(handle, ChainHandle[float])
    assert_type(await handle.result(), float)
    assert_type((chain | step).enqueue_sync(), ChainHandle[list[str]])
    await (chain | coroutine).enqueue()  # type: ignore[operator]
    await (step | 5).enqueue()  # type: ignore[operator]
