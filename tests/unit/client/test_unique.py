"""Unique tasks: which calls have the same key, what an enqueue gives, and what is refused when it is written."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError, DuplicateTask, InvalidArguments, NotSerializable, Queue, by
from leveret.brokers.sqlite import SQLiteBroker
from leveret.model import RERUN, UNIQUE_KEY, Envelope, limit_refs
from leveret.testing import under_test
from leveret.testing.bench import batches_of

if TYPE_CHECKING:
    from pathlib import Path


class Color(enum.Enum):
    RED = "red"


def keys(task: Any, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> list[object]:
    return [one.headers.get(UNIQUE_KEY) for one in task._envelopes(map(str, range(len(calls))), calls)]


def call(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def test_calls_that_mean_the_same_have_the_same_key() -> None:
    app = App("memory://")

    @app.task(unique=by("customer", "kind"))
    async def sync(customer: int, kind: str = "full", trace: str = "") -> None: ...

    same = keys(sync, call(42), call(customer=42), call(42, "full", "x"), call(kind="full", customer=42, trace="y"))
    assert same == ['sync:[42,"full"]'] * 4
    assert keys(sync, call(43), call(42, "part")) == ['sync:[43,"full"]', 'sync:[42,"part"]']


@pytest.mark.parametrize(
    ("annotation", "values"),
    [
        (float, [1, 1.0]),
        (dict, [{"a": 1, "b": 2}, {"b": 2, "a": 1}]),
        (frozenset[str], [frozenset("abc"), frozenset("cba")]),
        (dt.datetime, [dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "2026-01-01T00:00:00Z"]),
        (Color, [Color.RED, "red"]),
        (bytes, [b"ab", b"ab"]),
    ],
)
def test_values_that_arrive_equal_have_the_same_key(annotation: Any, values: list[Any]) -> None:
    app = App("memory://")

    async def take(it: Any, other: int = 0) -> None: ...

    take.__annotations__["it"] = annotation
    first, second = keys(app.task(unique=by("it"))(take), *(call(value) for value in values))
    assert first == second
    assert isinstance(first, str)


def test_texts_and_numbers_are_told_apart_and_long_keys_are_hashed() -> None:
    app = App("memory://")

    @app.task(unique=by("it"))
    async def take(it: Any) -> None: ...

    number, text, long, longer = keys(take, call(42), call("42"), call("x" * 300), call("x" * 301))
    assert (number, text) == ("take:42", 'take:"42"')
    assert long != longer
    assert len(str(long)) == len("take:") + 64


def test_a_key_may_be_the_name_alone_or_come_from_a_function_or_from_the_enqueue() -> None:
    app = App("memory://")

    @app.task(unique=by())
    async def only() -> None: ...

    @app.task(unique=lambda repo, **_: None if repo == "scratch" else repo.lower())
    async def build(repo: str, sha: str = "") -> None: ...

    assert keys(only, call()) == ["only"]
    assert keys(build, call("Hare", sha="1"), call("scratch")) == ["build:hare", None]
    assert keys(build.options(unique="repo:7"), call("a")) == ["build:repo:7"]
    assert keys(build.options(unique=False), call("a")) == [None]
    assert keys(build.options(unique=by("sha")).options(priority=3), call("a", "f")) == ['build:"f"']
    assert keys(build.options(unique=lambda *_, **__: [1, "a"]), call("a")) == ['build:[1,"a"]']


async def test_the_handle_follows_the_first() -> None:
    app = App("memory://")

    @app.task(unique=by("number"))
    async def double(number: int) -> int:
        return 2 * number

    with under_test(app) as test:
        first = await double.enqueue(4)
        again = await double.enqueue(number=4)
        assert (again.id, again.existing, first.existing) == (first.id, True, False)
        many = await double.enqueue_many([(4,), (5,), (5,)])
        assert [one.existing for one in many] == [True, False, True]
        assert many[1].id == many[2].id
        with pytest.raises(DuplicateTask, match=first.id) as caught:
            await double.options(on_conflict="raise").enqueue(4)
        assert list(caught.value.existing.values()) == [first.id]
        assert [one.unique_key for one in test.enqueued()] == ["double:4", "double:5"]
        assert "unique key 'double:4'" in str(test.enqueued()[0])
        await test.drain()
        assert await again.result() == 8
        assert not (await double.enqueue(4)).existing


async def test_a_task_does_not_see_its_key_among_its_headers() -> None:
    app = App("memory://")
    seen: list[dict[str, Any]] = []

    async def add(envelopes: Any, store: Any) -> None:
        await store([one.with_headers({"tenant": "acme"}) for one in envelopes])

    app = App("memory://", enqueue_middleware=[add])

    @app.task(unique=by())
    async def look() -> None:
        from leveret import current_task

        seen.append(dict(current_task().headers))

    with under_test(app) as test:
        assert (await look.enqueue()).id == (await look.enqueue()).id
        await test.drain()
    assert seen == [{"tenant": "acme"}]


def test_without_an_event_loop(tmp_path: Path) -> None:
    """The first call goes by the loop, the others write in this thread."""
    app = App(f"sqlite:///{tmp_path}/tasks.db")

    @app.task(unique=by("number"))
    async def double(number: int) -> int:
        return 2 * number

    try:
        handles = [double.enqueue_sync(number) for number in (1, 1, 2, 2, 1)]
        assert [one.existing for one in handles] == [False, True, False, True, True]
        assert len({one.id for one in handles}) == 2
        with pytest.raises(DuplicateTask):
            double.options(on_conflict="raise").enqueue_sync(1)
    finally:
        app.close_sync()


async def test_what_is_called_while_it_runs_runs_once_more() -> None:
    app, seen = App("memory://"), []

    @app.task(unique=by("repo", on_conflict="rerun"), limits=app.limit("builds", by="repo", concurrency=3))
    async def build(repo: int, commit: str) -> None:
        seen.append(commit)
        if commit == "a":
            assert not (await build.enqueue(repo, "b")).existing
            assert (await build.enqueue(repo, "c")).existing

    with under_test(app) as test:
        assert not (await build.enqueue(1, "first")).existing
        assert (await build.enqueue(1, "a")).existing
        (envelope,) = build._envelopes(["1"], [((1, "first"), {})])
        assert limit_refs(envelope.headers) == ((RERUN, "build:1"), ("builds", "1"))
        await test.drain()
    assert seen == ["a", "c"]


def test_what_cannot_run_once_more_is_refused() -> None:
    app = App("memory://")

    @app.task(acknowledge="before")
    async def forgotten(number: int) -> None: ...

    @app.task(limits=[app.limit(f"limit{number}", concurrency=1) for number in range(8)])
    async def limited(number: int) -> None: ...

    with pytest.raises(ConfigurationError, match="acknowledge='before'"):
        forgotten.options(unique=by(on_conflict="rerun"))
    with pytest.raises(ConfigurationError, match="acknowledge='before'"):
        app.task(acknowledge="before", unique=by(on_conflict="rerun"), name="other")(forgotten.function)
    with pytest.raises(ConfigurationError, match="at most 8 limits"):
        limited.options(unique=by(on_conflict="rerun"))
    with pytest.raises(ConfigurationError, match="Leveret's own"):
        app.limit(RERUN, concurrency=1)


async def test_a_later_call_replaces_the_arguments() -> None:
    app, seen = App("memory://"), []

    @app.task(unique=by("customer", on_conflict="replace"))
    async def sync(customer: int, trace: str = "") -> None:
        seen.append((customer, trace))

    with under_test(app) as test:
        first = await sync.options(id="mine").enqueue(1, "a")
        second = await sync.options(expires=60, headers={"tenant": "acme"}).enqueue(1, "b")
        assert (second.id, second.existing, first.existing) == ("mine", True, False)
        (noted,) = test.enqueued(sync)
        assert (noted.arguments, noted.headers) == ({"customer": 1, "trace": "b"}, {"tenant": "acme"})
        assert noted.expires is not None
        assert noted.expires >= 60.0, "it counts from the later call"
        handles = await sync.enqueue_many([(2, "a"), (2, "b"), (3, "a")])
        assert [one.existing for one in handles] == [False, True, False]
        await test.drain()
    assert seen == [(1, "b"), (2, "b"), (3, "a")]


async def test_calls_are_debounced() -> None:
    """By the test's clock: each call puts the task off, at most until the first one's max_wait."""
    app, seen = App("memory://"), []

    @app.task(unique=by("doc", debounce=dt.timedelta(seconds=5), max_wait=12))
    async def index(doc: int, text: str) -> None:
        seen.append((doc, text))

    with under_test(app) as test:
        for seconds, text in ((0, "a"), (4, "b"), (4, "c")):
            test.clock.advance(seconds)
            await test.drain()
            handle = await index.enqueue(1, text)
            assert handle.existing == (text != "a")
        test.clock.advance(3.9)
        await test.drain()
        assert seen == []
        test.clock.advance(0.2)
        await test.drain()
        assert seen == [(1, "c")]
        assert not (await index.enqueue(1, "d")).existing
        short = index.options(debounce=1, max_wait=1)
        await short.enqueue(2, "a")
        assert [one.delay for one in test.enqueued(index)] == pytest.approx([12.0, 5.0, 1.0], abs=0.01)


def test_a_debounced_call_without_a_key_is_not_delayed() -> None:
    app = App("memory://")

    @app.task(unique=lambda number: None if number else "zero")
    async def one(number: int) -> None: ...

    debounced, at_once = one.options(debounce=5)._envelopes("ab", [call(0), call(1)])
    assert debounced.due is not None
    assert at_once.due is None


@pytest.mark.parametrize("door", ["async", "sync"])
async def test_on_sqlite_a_later_call_replaces_the_arguments(tmp_path: Path, door: str) -> None:
    app = App(f"sqlite:///{tmp_path}/tasks.db")

    @app.task(unique=by("number", on_conflict="replace"))
    async def take(number: int, text: str) -> None: ...

    def enqueue(text: str) -> Any:
        return take.enqueue_sync(1, text)

    if door == "sync":
        handles = [await asyncio.to_thread(enqueue, text) for text in "abc"]
        await asyncio.to_thread(app.close_sync)
    else:
        handles = [await take.enqueue(1, text) for text in "abc"]
        await app.close()
    assert [one.existing for one in handles] == [False, True, True]
    broker = SQLiteBroker(tmp_path / "tasks.db", timeout=5.0)
    async with broker.consume([Queue("default")], credit=2) as consumer:
        (delivery,) = await anext(batches_of(consumer))
    assert (delivery.envelope.id, b'"c"' in delivery.envelope.body) == (handles[0].id, True)
    await broker.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"debounce": 0}, "above 0|more than 0|greater"),
        ({"debounce": "soon"}, "debounce"),
        ({"max_wait": 5}, "give debounce, too"),
        ({"debounce": 5, "max_wait": 4.5}, "at least debounce"),
        ({"debounce": 5, "for_": 60}, "give one of them"),
        ({"debounce": 5, "on_conflict": "raise"}, "on_conflict='raise'"),
        ({"for_": 5, "on_conflict": "replace"}, "nothing to replace"),
        ({"for_": 5, "on_conflict": "rerun"}, "nothing to replace .* on_conflict='rerun'"),
    ],
)
def test_what_does_not_go_together_is_refused_where_it_is_written(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        by("customer", **options)


def test_what_an_enqueue_says_of_debouncing_is_checked() -> None:
    app = App("memory://")

    @app.task
    async def plain(number: int) -> None: ...

    keyed = plain.options(unique="key")
    with pytest.raises(ConfigurationError, match="debounce is given, and task 'plain' has no unique key"):
        plain.options(debounce=5)
    with pytest.raises(ConfigurationError, match="no delay or at"):
        keyed.options(debounce=5, delay=3)
    with pytest.raises(ConfigurationError, match="no delay or at"):
        keyed.options(delay=3).options(debounce=5)
    with pytest.raises(ConfigurationError, match="give debounce, too"):
        keyed.options(max_wait=5)
    with pytest.raises(ConfigurationError, match="on_conflict='raise'"):
        keyed.options(debounce=5).options(on_conflict="raise")


@pytest.mark.parametrize(
    ("unique", "message"),
    [
        (by("custmer"), "no parameter 'custmer'; did you mean 'customer'"),
        (by("xyz"), "it has: customer"),
        (5, "unique is 5"),
        ("", "at least one character"),
        (int, "must be by"),
    ],
)
def test_what_cannot_be_a_key_is_refused_where_it_is_written(unique: Any, message: str) -> None:
    app = App("memory://")

    async def sync(customer: int) -> None: ...

    with pytest.raises(ConfigurationError, match=message):
        app.task(unique=unique)(sync)
    task = app.task(sync)
    with pytest.raises(ConfigurationError, match=message):
        task.options(unique=unique)


def test_an_asynchronous_function_and_an_unknown_policy_are_refused() -> None:
    app = App("memory://")

    async def key(customer: int) -> str: ...  # type: ignore[empty-body]

    with pytest.raises(ConfigurationError, match="asynchronous"):
        app.task(unique=key)
    with pytest.raises(ConfigurationError, match="'ignore', 'raise', 'replace', 'rerun'"):
        by("customer", on_conflict="again")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="names of parameters"):
        by(5)  # type: ignore[arg-type]

    @app.task
    async def plain() -> None: ...

    with pytest.raises(ConfigurationError, match="has no unique key"):
        plain.options(on_conflict="raise")


def test_a_key_that_is_not_json_is_named() -> None:
    app = App("memory://")

    @app.task(unique=lambda it: it)
    async def take(it: Any) -> None: ...

    for value in (object(), {1.5: object()}, "\ud800"):
        with pytest.raises((NotSerializable, InvalidArguments), match="take"):
            take._envelopes(["1"], [call(value)])
    with pytest.raises(NotSerializable, match="unique key of task 'take'"):
        keys(take.options(unique=lambda _: object()), call(1))


async def test_a_header_that_is_no_key_is_none(tmp_path: Path) -> None:
    """A foreign message may carry anything."""
    broker = SQLiteBroker(tmp_path / "tasks.db", timeout=5)
    from leveret import Queue

    await broker.declare([Queue("work")])
    for number, value in enumerate((7, "", "x" * 300)):
        for turn in range(2):
            await broker.publish([Envelope(f"{number}{turn}", "work", "say", b"", headers={UNIQUE_KEY: value})])
    (stats,) = await broker.queues.stats()
    assert stats.ready == 6
    await broker.close()


async def test_a_key_is_listed_and_released() -> None:
    app = App("memory://")

    @app.task(unique=by("number"))
    async def double(number: int) -> int:
        return 2 * number

    with under_test(app):
        first = await double.enqueue(4)
        await double.enqueue(3)
        assert [(one.key, one.queue) for one in await app.unique.holders()] == [
            ("double:3", "default"),
            ("double:4", "default"),
        ]
        assert await app.unique.release("double:4")
        assert not await app.unique.release("double:4")
        assert (await double.enqueue(4)).id != first.id


async def test_a_key_may_be_taken_for_a_while() -> None:
    app = App("memory://")

    @app.task(unique=by("number", for_=dt.timedelta(minutes=10)))
    async def double(number: int) -> int:
        return 2 * number

    with under_test(app) as test:
        first = await double.enqueue(4)
        await test.drain()
        again = await double.enqueue(4)
        assert (again.id, again.existing, await again.result()) == (first.id, True, 8)
        test.clock.advance(601)
        assert not (await double.enqueue(4)).existing
    for wrong in (0, -1, "x"):
        with pytest.raises(ConfigurationError, match="for_"):
            by("number", for_=wrong)  # type: ignore[arg-type]


async def test_a_key_may_be_free_when_its_task_begins() -> None:
    app = App("memory://")
    seen: list[tuple[str, bool]] = []

    @app.task(unique=by("number", scope="waiting"))
    async def index(number: int, last: bool = False) -> None:
        if not last:
            following = await index.enqueue(number, last=True)
            seen.append((following.id, following.existing))

    with under_test(app) as test:
        first = await index.enqueue(1)
        assert (await index.enqueue(1)).id == first.id
        runs = await test.drain()
    assert [run.id for run in runs] == [first.id, seen[0][0]]
    assert not seen[0][1]
    with pytest.raises(ConfigurationError, match="scope"):
        by(scope="running")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="two answers"):
        by(scope="waiting", for_=5)
