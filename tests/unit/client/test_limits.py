"""Limits of an application: which calls have which keys, what is refused when it is written, what ``Limited`` does."""

from __future__ import annotations

import importlib
import json
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError, Limited, Queue, Rate, every
from leveret.client import Limit
from leveret.executors import Manifest
from leveret.model import FAIR_KEY, LIMITS, LimitRule, PutOff, Retrying, Succeeded
from leveret.testing import under_test

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def headers(task: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    (envelope,) = task._envelopes(["1"], [(args, kwargs)])
    return {name: json.loads(value) if name == LIMITS else value for name, value in envelope.headers.items()}


def test_a_call_carries_its_limits_and_for_whom_it_is() -> None:
    app = App("memory://", queues=[Queue("render", fair_by="tenant")])
    stripe, tenant = app.limit("stripe", rate=Rate(5)), app.limit("tenant", by="tenant", concurrency=3)

    @app.task(queue="render", limits=[stripe, tenant])
    async def charge(tenant: str, cents: int = 5) -> None: ...

    @app.task(limits=stripe)
    async def ping() -> None: ...

    @app.task
    async def free() -> None: ...

    wanted = {LIMITS: [["stripe", ""], ["tenant", "acme"]], FAIR_KEY: "acme"}
    assert headers(charge, "acme") == headers(charge, tenant="acme", cents=7) == wanted
    assert headers(ping) == {LIMITS: [["stripe", ""]]}
    assert headers(free) == {}
    assert charge.limits == (stripe, tenant)
    assert headers(charge.options(queue="default"), "acme") == {LIMITS: wanted[LIMITS]}
    assert headers(charge.options(limits=[], queue="default"), "acme") == {}
    assert headers(charge.options(limits=[]), "acme") == {FAIR_KEY: "acme"}
    assert headers(charge.options(headers={"trace": "x"}), "acme") == {**wanted, "trace": "x"}


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("acme", "acme"),
        (7, "7"),
        (None, "null"),
        (["b", "a"], '["b","a"]'),
        ({"b": 1, "a": 2}, '{"a":2,"b":1}'),
        ("", ""),
    ],
)
def test_a_key_is_text_as_it_is_or_else_json(value: Any, key: str) -> None:
    app = App("memory://")

    @app.task(limits=app.limit("tenant", by="tenant", concurrency=1))
    async def charge(tenant: Any) -> None: ...

    assert headers(charge, value)[LIMITS] == [["tenant", key]]


def test_a_long_key_is_hashed_and_several_parameters_are_a_list() -> None:
    app = App("memory://")

    @app.task(limits=app.limit("pair", by=["host", "port"], concurrency=1))
    async def call(host: str, port: int = 80) -> None: ...

    assert headers(call, "a")[LIMITS] == headers(call, port=80, host="a")[LIMITS] == [["pair", '["a",80]']]
    (one,), (other,) = headers(call, "é" * 300)[LIMITS], headers(call, "é" * 301)[LIMITS]
    assert one != other
    assert len(one[1]) == 64


def test_schedules_have_their_tasks_limits() -> None:
    app = App("memory://", queues=[Queue("render", fair_by="tenant")])
    tenant = app.limit("tenant", by="tenant", concurrency=1)

    @app.task(queue="render", limits=tenant, schedule=every(minutes=5).with_args("acme"))
    async def sync(tenant: str) -> None: ...

    (schedule,) = app.registry.schedules("here")
    assert schedule.message.headers[LIMITS] == '[["tenant","acme"]]'
    assert schedule.message.headers[FAIR_KEY] == "acme"


def test_a_worker_learns_the_rules_and_the_queues() -> None:
    app = App("memory://", queues=[Queue("render", concurrency=4), Queue("mail", fair_by="tenant"), Queue("plain")])
    stripe = app.limit("stripe", concurrency=2, rate=Rate(10, per=timedelta(minutes=1)))

    @app.task(limits=[stripe])
    async def charge() -> None: ...

    manifest = Manifest.of(app)
    assert manifest.limits == {"stripe": LimitRule(2, Rate(10, 60)), "queue:render": LimitRule(4)}
    assert manifest.limited_queues == ["default", "mail", "render"]
    assert list(app.limits) == [stripe]
    assert repr(stripe) == "<Limit stripe: 2 at once, 10/minute>"


def a_task(**given: Any) -> Callable[[App], object]:
    def define(app: App) -> object:
        @app.task(**{name: value(app) if callable(value) else value for name, value in given.items()})
        async def charge(tenant: str) -> None: ...

        return charge

    return define


FAIR = [Queue("fair", fair_by="tenant"), Queue("misspelt", fair_by="tenamt"), Queue("few", concurrency=2)]


@pytest.mark.parametrize(
    ("define", "why"),
    [
        (lambda app: app.limit("stripe", concurrency=0), "limit 'stripe': concurrency is 0; it must be a whole number"),
        (lambda app: app.limit("stripe", concurrency=True), "concurrency is True"),
        (lambda app: app.limit("stripe", rate=5), r"rate is 5; it must be a Rate, as Rate\(100, per=60\)"),
        (lambda app: app.limit("stripe", rate=Rate(0)), "Rate: count is 0"),
        (lambda app: app.limit("stripe", rate=Rate(1, per=0)), "Rate: per is 0; it must be more than 0 seconds"),
        (lambda app: app.limit("stripe", rate=Rate(1, burst=0)), "Rate: burst is 0"),
        (lambda app: app.limit(""), "limit name '' must be printable text"),
        (lambda app: app.limit("queue:mail"), "without 'queue:'"),
        (lambda app: app.limit("x" * 129), "1 to 128 bytes"),
        (lambda app: app.limit("stripe", by=5), "by is 5; it must be the name of a parameter"),
        (lambda app: app.limit("stripe", by=[""]), "must be the name of a parameter"),
        (lambda app: [app.limit("stripe"), app.limit("stripe")], "two limits are called 'stripe'; make it once"),
        (a_task(limits="stripe"), r"limits has 'stripe'; give it a list of what app.limit\('stripe', ...\) returned"),
        (a_task(limits=[5]), "limits has 5"),
        (
            a_task(limits=lambda app: app.limit("by", by="tenamt")),
            "limit 'by' is by 'tenamt', and task 'charge' has no parameter 'tenamt'; did you mean 'tenant'",
        ),
        (
            a_task(limits=lambda _: App("memory://").limit("other")),
            "task 'charge': limit 'other' is another application's",
        ),
        (
            a_task(limits=lambda app: [app.limit(f"limit-{number}") for number in range(9)]),
            "limits has 9 limits; a task has 8 at most",
        ),
        (
            a_task(queue="misspelt"),
            "queue 'misspelt' has fair_by='tenamt', and task 'charge' has no parameter 'tenamt'; did you mean 'tenant'",
        ),
        (
            a_task(limits=lambda app: app.limit("few", concurrency=2), acknowledge="before"),
            "acknowledge='before', so the broker has forgotten it while it runs",
        ),
        (a_task(queue="few", acknowledge="before"), "concurrency of queue 'few' cannot count it; a rate can"),
        (lambda app: a_task()(app).options(queue="misspelt"), "queue 'misspelt' has fair_by='tenamt'"),  # type: ignore[attr-defined]
        (lambda _: Queue("few", concurrency=0), "queue 'few': concurrency is 0"),
        (lambda _: Limited("stripe", for_="soon"), "it must be 0 or more seconds"),  # type: ignore[arg-type]
        (lambda _: Limited(5, for_=1), r"Limited\(5\): it must be a limit of app.limit"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_work_is_refused_when_it_is_written(define: Callable[[App], object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        define(App("memory://", queues=FAIR))


def test_a_module_that_is_run_again_makes_its_limits_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limits_home.py").write_text("from leveret import App\napp = App('memory://')\n")
    (tmp_path / "limits_again.py").write_text("import limits_home\nlimit = limits_home.app.limit('one')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("limits_again")
    first = module.limit
    importlib.reload(module)
    assert isinstance(first, Limit)
    assert module.limit is not first
    assert module.limits_home.app.registry.limits["one"] is module.limit
    with pytest.raises(ConfigurationError, match="two limits are called 'one'"):
        module.limits_home.app.limit("one")
    for name in ("limits_again", "limits_home"):
        del sys.modules[name]


async def test_a_drain_heeds_limits_and_the_tests_clock() -> None:
    app = App("memory://", queues=[Queue("render", concurrency=2, fair_by="tenant")])
    slow = app.limit("slow", rate=Rate(2, per=10, burst=1))
    order: list[str] = []
    running = 0

    @app.task(queue="render")
    async def render(tenant: str, number: int) -> None:
        nonlocal running
        running += 1
        assert running <= 2
        order.append(f"{tenant}{number}")
        await _turn()
        running -= 1

    @app.task(limits=slow)
    async def call() -> None: ...

    with under_test(app) as test:
        await render.enqueue_many([("a", number) for number in range(5)] + [("b", number) for number in range(2)])
        await call.enqueue_many([()] * 3)
        assert len(await test.drain(concurrency=8)) == 7 + 1
        assert order == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]
        assert (await slow.use()).waiting == 2
        assert test.clock.skip() == pytest.approx(5)
        assert len(await test.drain()) == 1
        test.clock.advance(5)
        assert len(await test.drain()) == 1
        assert (await slow.use()).waiting == 0


async def _turn() -> None:
    import asyncio

    await asyncio.sleep(0.001)


async def test_a_task_that_was_told_to_wait_is_not_charged() -> None:
    app = App("memory://")
    tenant = app.limit("tenant", by="tenant", rate=Rate(1_000))
    told: list[int] = []

    @app.task(limits=tenant, max_attempts=1)
    async def charge(*, tenant: str) -> str:
        if not told:
            told.append(429)
            raise Limited("tenant", for_=timedelta(seconds=30))
        return tenant

    with under_test(app) as test:
        await charge.enqueue(tenant="acme")
        await charge.enqueue(tenant="acme")
        await charge.enqueue(tenant="other")
        first, second = await test.drain()
        assert first.outcome == PutOff("tenant", "acme", 30.0)
        assert (second.result, second.attempt) == ("other", 1)
        assert test.clock.skip() == pytest.approx(30, abs=0.01)
        again = await test.drain()
        assert [(run.result, run.attempt) for run in again] == [("acme", 1)] * 2


async def test_what_raises_a_limit_that_it_does_not_have_has_failed() -> None:
    app = App("memory://")
    stripe = app.limit("stripe", concurrency=1)

    @app.task
    async def charge() -> None:
        raise Limited(stripe, for_=30)

    with under_test(app) as test:
        await charge.enqueue()
        (run,) = await test.drain(expect=Limited)
        assert isinstance(run.outcome, Retrying)
        assert "the task does not have the limit 'stripe': give it limits=[...]" in run.outcome.error


async def test_at_most_once_and_put_off_is_dead() -> None:
    app = App("memory://")
    stripe = app.limit("stripe", rate=Rate(100))

    @app.task(limits=stripe, acknowledge="before")
    async def charge() -> None:
        raise Limited(stripe, for_=30)

    with under_test(app) as test:
        await charge.enqueue()
        await test.drain()
        assert (await test.app.handle(test.enqueued()[0].id).status()).state == "dead"


async def test_groups_are_judged_by_what_is_in_them() -> None:
    app = App("memory://")
    stripe = app.limit("stripe", rate=Rate(100))
    raised: list[BaseException] = [
        ExceptionGroup("", [Limited(stripe, for_=5), Limited(stripe, for_=9)]),
        ExceptionGroup("", [Limited(stripe, for_=5), ValueError("broken")]),
    ]

    @app.task(limits=stripe)
    async def charge(number: int) -> None:
        raise raised[number]

    with under_test(app) as test:
        await charge.enqueue(0)
        (run,) = await test.drain()
        assert run.outcome == PutOff("stripe", "", 9.0)
        await stripe.resume()
        await charge.options(limits=[]).enqueue(1)
        await stripe.pause()
        (run,) = await test.drain(expect=(ValueError, Limited))
        assert isinstance(run.outcome, Retrying)


async def test_a_limit_is_changed_paused_and_reset() -> None:
    app = App("memory://")
    stripe = app.limit("stripe", concurrency=20, rate=Rate(100, per=60))

    @app.task(limits=stripe)
    async def charge() -> None: ...

    with under_test(app) as test:
        await stripe.set(concurrency=5)
        assert (await stripe.use()).row.rule == LimitRule(5, Rate(100, per=60))
        await stripe.set(rate=None)
        assert (await stripe.use()).row.rule == LimitRule(5, None)
        await stripe.reset()
        assert (await stripe.use()).row.rule == stripe.rule
        with pytest.raises(ConfigurationError, match=r"set\(\) changes nothing"):
            await stripe.set()
        with pytest.raises(ConfigurationError, match="concurrency is 0"):
            await stripe.set(concurrency=0)
        await stripe.pause()
        await charge.enqueue()
        assert await test.drain() == []
        await stripe.resume()
        (run,) = await test.drain()
        assert isinstance(run.outcome, Succeeded)


async def test_a_limit_that_no_worker_has_declared_yet_can_be_paused() -> None:
    app = App("memory://")
    stripe = app.limit("stripe", concurrency=20)
    async with app:
        assert (await stripe.use()).row.rule == stripe.rule
        await stripe.pause()
        assert (await stripe.use()).row.paused
