"""What is wrapped around an enqueue: it may add headers and refuse, and what returns has stored its tasks."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, BrokerUnavailable, ConfigurationError, LeveretError, current_task
from leveret.brokers.memory import MemoryBroker
from leveret.testing import under_test

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.brokers import OnConflict
    from leveret.model import EnqueueMiddleware, Envelope, Store

steps: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    steps.clear()


async def with_tenant(envelopes: Sequence[Envelope], store: Store) -> None:
    await store([envelope.with_headers({"tenant": "acme"}) for envelope in envelopes])


def noting(name: str) -> EnqueueMiddleware:
    async def note(envelopes: Sequence[Envelope], store: Store) -> None:
        steps.append(f"{name}: {[dict(envelope.headers) for envelope in envelopes]}")
        await store(envelopes)
        steps.append(f"{name}: stored")

    return note


def an_app(*layers: Any, telemetry: Any = None) -> App:
    app = App("memory://", enqueue_middleware=layers, telemetry=telemetry)

    @app.task
    async def work(number: int = 0) -> Any:
        return number, dict(current_task().headers)

    return app


def work_of(app: App) -> Any:
    return app.registry.find("work", "default")


async def stored_in(app: App) -> int:
    """How many tasks are in the queue, whatever became of the enqueue."""
    return sum(stats.ready for stats in await app.client.broker.queues.stats(["default"]))


async def test_a_header_travels_from_the_enqueue_to_the_task() -> None:
    with under_test(an_app(with_tenant)) as test:
        await work_of(test.app).options(headers={"request": 7}).enqueue(1)
        (run,) = await test.drain()
    assert run.result == [1, {"request": 7, "tenant": "acme"}]


async def test_it_may_replace_and_remove_what_the_caller_gave() -> None:
    async def censored(envelopes: Sequence[Envelope], store: Store) -> None:
        await store([msgspec.structs.replace(one, headers={"request": "hidden"}) for one in envelopes])

    with under_test(an_app(censored)) as test:
        await work_of(test.app).options(headers={"request": 7, "password": "secret"}).enqueue(1)
        (run,) = await test.drain()
    assert run.result == [1, {"request": "hidden"}]


async def test_the_first_one_is_the_outermost() -> None:
    async with an_app(noting("outer"), with_tenant, noting("inner")) as app:
        await work_of(app).enqueue(1)
    assert steps == ["outer: [{}]", "inner: [{'tenant': 'acme'}]", "inner: stored", "outer: stored"]


async def test_many_are_one_enqueue() -> None:
    with under_test(an_app(noting("one"), with_tenant)) as test:
        handles = await work_of(test.app).enqueue_many([(1,), (2,), (3,)])
        runs = await test.drain()
    assert steps == ["one: [{}, {}, {}]", "one: stored"]
    assert [run.result for run in runs] == [[number, {"tenant": "acme"}] for number in (1, 2, 3)]
    assert [run.id for run in runs] == [handle.id for handle in handles]


def test_without_an_event_loop_too() -> None:
    with under_test(an_app(with_tenant)) as test:
        work_of(test.app).enqueue_sync(1)
        (run,) = test.drain_sync()
    assert run.result == [1, {"tenant": "acme"}]


def test_it_has_the_context_of_who_enqueues() -> None:
    tenant = ContextVar("tenant", default="nobody")

    async def with_its_tenant(envelopes: Sequence[Envelope], store: Store) -> None:
        await store([envelope.with_headers({"tenant": tenant.get()}) for envelope in envelopes])

    with under_test(an_app(with_its_tenant)) as test:
        copy_context().run(lambda: (tenant.set("acme"), work_of(test.app).enqueue_sync(1)))
        work_of(test.app).enqueue_sync(2)
        runs = test.drain_sync()
    assert [run.result for run in runs] == [[1, {"tenant": "acme"}], [2, {"tenant": "nobody"}]]


async def test_it_is_around_what_a_task_enqueues() -> None:
    app = an_app(with_tenant)

    @app.task
    async def parent() -> None:
        await work_of(app).enqueue(2)

    with under_test(app) as test:
        await parent.enqueue()
        _, child = await test.drain()
    assert child.result == [2, {"tenant": "acme"}]


async def test_it_refuses_by_raising() -> None:
    async def refuse(envelopes: Sequence[Envelope], store: Store) -> None:
        if any(b"13" in envelope.body for envelope in envelopes):
            raise PermissionError("not today")
        await store(envelopes)

    async with an_app(noting("outer"), refuse) as app:
        with pytest.raises(PermissionError, match="not today"):
            await work_of(app).enqueue_many([(1,), (13,)])
        assert await stored_in(app) == 0
        await work_of(app).enqueue(1)
        assert await stored_in(app) == 1


async def test_what_the_broker_refuses_reaches_the_caller_through_it() -> None:
    async def translate(envelopes: Sequence[Envelope], store: Store) -> None:
        try:
            await store(envelopes)
        except LeveretError as error:
            raise RuntimeError("try the other door") from error

    for layers, raised in (((with_tenant,), BrokerUnavailable), ((translate, with_tenant), RuntimeError)):
        app = an_app(*layers)
        with app.client.enqueuing_to(Gone()), pytest.raises(raised):
            await work_of(app).enqueue(1)


async def test_it_cannot_hide_that_nothing_is_stored() -> None:
    async def swallow(envelopes: Sequence[Envelope], store: Store) -> None:
        try:
            await store(envelopes)
        except LeveretError:
            steps.append("swallowed")

    app = an_app(swallow)
    with app.client.enqueuing_to(Gone()), pytest.raises(BrokerUnavailable):
        await work_of(app).enqueue(1)
    assert steps == ["swallowed"]


async def test_it_may_try_again() -> None:
    async def stubborn(envelopes: Sequence[Envelope], store: Store) -> None:
        for _ in range(3):
            try:
                await store(envelopes)
                break
            except BrokerUnavailable:
                steps.append("again")

    app, broker = an_app(stubborn), Gone(times=2)
    with app.client.enqueuing_to(broker):
        await work_of(app).enqueue(1)
    assert steps == ["again", "again"]
    assert await broker.queues.stats(["default"])


async def test_what_it_raises_afterwards_does_not_hide_that_the_tasks_are_stored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def careless(envelopes: Sequence[Envelope], store: Store) -> None:
        await store(envelopes)
        raise LookupError("afterwards")

    async with an_app(careless) as app:
        handle = await work_of(app).enqueue(1)
        assert (await handle.status()).state == "queued"
    assert "careless" in caplog.text
    assert "LookupError: afterwards" in caplog.text


async def test_a_cancelled_enqueue_is_cancelled_inside_of_it_too() -> None:
    async def slow(envelopes: Sequence[Envelope], store: Store) -> None:
        await store(envelopes)
        await asyncio.Event().wait()

    async with an_app(slow) as app:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await work_of(app).enqueue(1)
        assert await stored_in(app) == 1


def changing(**fields: Any) -> EnqueueMiddleware:
    async def wayward(envelopes: Sequence[Envelope], store: Store) -> None:
        await store([msgspec.structs.replace(one, **fields) for one in envelopes])

    return wayward


async def wayward_twice(envelopes: Sequence[Envelope], store: Store) -> None:
    await store([*envelopes, *envelopes])


async def wayward_none(envelopes: Sequence[Envelope], store: Store) -> None:
    del envelopes
    await store(None)  # type: ignore[arg-type]


async def wayward_texts(envelopes: Sequence[Envelope], store: Store) -> None:
    await store(["a" for _ in envelopes])  # type: ignore[misc]


async def wayward_forgets(envelopes: Sequence[Envelope], store: Store) -> None:
    del envelopes, store


def wayward_plain(envelopes: Sequence[Envelope], store: Store) -> None:
    del envelopes, store


async def wayward_in_place(envelopes: Sequence[Envelope], store: Store) -> None:
    for envelope in envelopes:
        envelope.headers["when"] = [1]
    await store(envelopes)


async def wayward_large(envelopes: Sequence[Envelope], store: Store) -> None:
    await store([one.with_headers({"a": "x" * 20_000}).with_headers({"b": "x" * 20_000}) for one in envelopes])


async def wayward_calm(envelopes: Sequence[Envelope], store: Store) -> None:
    """Its mistake is the caller's to know, though it keeps that to itself."""
    try:
        await store([])
    except ConfigurationError:
        await store(envelopes[:-1])


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (changing(id="other"), "changed 'id' of task"),
        (changing(queue="other"), "changed 'queue' of task"),
        (changing(task="other"), "changed 'task' of task"),
        (changing(body=b"{}"), "changed 'body' of task"),
        (changing(due=1.0), "changed 'due' of task"),
        (changing(headers={}), "headers is without 'leveret-timeout'"),
        (changing(headers={"leveret-timeout": 1}), "names that begin with 'leveret-'"),
        (changing(headers={"leveret-timeout": 60_000, "x-death": 1}), "names that begin with 'leveret-'"),
        (changing(headers={"leveret-timeout": 60_000, "CC": "everybody"}), "names CC and BCC"),
        (changing(headers={"leveret-timeout": 60_000, "when": [1]}), r"headers\['when'\] is \[1\]"),
        (changing(headers=None), "headers is None"),
        (wayward_in_place, r"headers\['when'\] is \[1\]"),
        (wayward_large, "over the limit"),
        (wayward_twice, "gave 2 tasks of 1"),
        (wayward_none, "gave None"),
        (wayward_texts, "gave 'a'"),
        (wayward_forgets, r"returned without 'await store\(\.\.\.\)'.*refuses tasks by raising"),
        (wayward_plain, r"returned None, which cannot be awaited.*'async def'"),
        (wayward_calm, "gave 0 tasks of 1"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_an_error_names_it_and_nothing_is_stored(layer: Any, why: str) -> None:
    async with an_app(layer) as app:
        with pytest.raises(ConfigurationError, match=rf"(?s)the enqueue middleware .*wayward.*{why}"):
            await work_of(app).options(timeout=60).enqueue(1)
        assert await stored_in(app) == 0


async def test_it_stores_once(caplog: pytest.LogCaptureFixture) -> None:
    async def twice(envelopes: Sequence[Envelope], store: Store) -> None:
        await store(envelopes)
        await store(envelopes)

    async with an_app(twice) as app:
        await work_of(app).enqueue(1)
        assert await stored_in(app) == 1
    assert "stored already" in caplog.text


@pytest.mark.parametrize("value", [with_tenant, [None], ["with_tenant"], "with_tenant", None])
def test_it_is_a_list_of_functions(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"enqueue_middleware is .*; it must be a list of functions"):
        App("memory://", enqueue_middleware=value)


class Told:
    """A telemetry that adds a header which users may not, and sees what is stored."""

    def __init__(self, mark: Callable[[Sequence[Envelope]], Any] | None = None) -> None:
        self._mark = mark or self._marked

    def sending(self, envelopes: Sequence[Envelope], url: str, /) -> Any:
        steps.append(url)
        return Span(lambda: self._mark(envelopes))

    def _marked(self, envelopes: Sequence[Envelope]) -> Sequence[Envelope]:
        return [one.with_headers({"x-b3-traceid": "1"}) for one in envelopes]


class Span:
    def __init__(self, enter: Callable[[], Any]) -> None:
        self._enter = enter

    def __enter__(self) -> Any:
        return self._enter()

    def __exit__(self, *error: object) -> bool:
        steps.append(f"over: {error[0]}")
        return True


async def test_a_telemetry_is_the_outermost() -> None:
    async with an_app(noting("user"), with_tenant, telemetry=Told()) as app:
        await work_of(app).enqueue(1)
        assert await stored_in(app) == 1
    assert steps == ["memory://", "user: [{'x-b3-traceid': '1'}]", "user: stored", "over: None"]


async def test_a_telemetry_does_not_swallow_what_a_middleware_raises() -> None:
    async def refuse(envelopes: Sequence[Envelope], store: Store) -> None:
        raise PermissionError(f"{len(envelopes)} for {store}")

    app = an_app(refuse, telemetry=Told())
    with pytest.raises(PermissionError):
        await work_of(app).enqueue(1)
    assert steps == ["memory://", "over: <class 'PermissionError'>"]


def fails(envelopes: Sequence[Envelope]) -> Any:
    raise LookupError(f"{len(envelopes)} envelopes: the telemetry's own mistake")


@pytest.mark.parametrize("mark", [fails, lambda _: None, lambda _: [], lambda _: ["a"], lambda _: 5])
async def test_a_telemetry_that_fails_changes_nothing(mark: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with an_app(with_tenant, telemetry=Told(mark)) as app:
        handle = await work_of(app).enqueue(1)
        assert (await handle.status()).state == "queued"
        assert await stored_in(app) == 1
    assert caplog.text.count("the application's telemetry failed") == 1


class Gone(MemoryBroker):
    """A broker that is not there, so many times."""

    def __init__(self, times: int = 1_000) -> None:
        super().__init__()
        self._times = times

    async def publish(self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise") -> None:
        self._times -= 1
        if self._times >= 0:
            raise BrokerUnavailable("gone")
        await super().publish(envelopes, on_conflict=on_conflict)
