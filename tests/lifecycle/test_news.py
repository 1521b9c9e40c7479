"""News of tasks from RabbitMQ's stream, on real nodes, when something comes in between."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import aio_pika
import msgspec

from leveret.brokers import CancelRequests, connect
from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.brokers.rabbitmq.amqp.hosts import Hosts
from leveret.brokers.rabbitmq.queues.publisher import Publisher
from leveret.brokers.rabbitmq.statuses.log import StatusLog
from leveret.brokers.rabbitmq.statuses.streams import Batch, Reading, to_message, was_just_made
from leveret.model import DeadLettered, Envelope, Queue, Retrying, Succeeded, new_id
from leveret.model.status import enqueued, settled, started
from tests.support.proxy import Proxy
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence

    import pytest

    from leveret.brokers.rabbitmq.amqp.connections import Link
    from leveret.model.status import Status
    from tests.support.nodes import Node


def task(id_: str = "") -> Envelope:
    return Envelope(id_ or new_id(), "work", "say", b"{}", enqueued_at=time.time())


@contextmanager
def user_on(node: Node, *permissions: str) -> Iterator[str]:
    """Somebody else, whose password is the name."""
    name = f"rita-{new_id()}"
    node.ctl("add_user", name, name)
    node.ctl("set_permissions", name, *permissions)
    try:
        yield name
    finally:
        node.ctl("delete_user", name)


def succeeded(envelope: Envelope, result: bytes) -> Status:
    return settled(envelope, "say", Succeeded(result), time.time())


@contextmanager
def message_limit(node: Node, size: int) -> Iterator[None]:
    """The server's own, for channels that are opened from now on: 3.10 has it in one place and 4 in another."""

    def have(limit: str) -> None:
        node.evaluate(
            f"application:set_env(rabbit, max_message_size, {limit}), persistent_term:put(max_message_size, {limit})."
        )

    usual = node.evaluate("application:get_env(rabbit, max_message_size, 16777216).").strip()
    have(str(size))
    try:
        yield
    finally:
        have(usual)


@asynccontextmanager
async def events_on(node: Node, *, user: str = "guest", reading_from: str = "") -> AsyncGenerator[StatusLog]:
    """They publish to the node, and read from there or by way of a proxy."""
    url = node.url.replace("guest:guest", f"{user}:{user}")
    publisher = Publisher(Hosts(url, timeout=20.0), timeout=20.0)
    events = StatusLog(Hosts(reading_from or url, timeout=20.0), publisher, keep=600.0, timeout=20.0)
    try:
        yield events
    finally:
        await events.close()
        await publisher.close()


async def test_a_task_that_is_told_of_while_the_answer_is_late_is_found(node: Node) -> None:
    """On a busy machine an answer may take longer than a task counts as just made."""
    with Proxy(node.port) as proxy:
        async with events_on(node, reading_from=proxy.url) as events:
            envelope = task()
            proxy.swallow_from(b"sentinel")
            asking = asyncio.create_task(events.read([envelope.id]))

            async def is_late() -> bool:
                return proxy.swallows

            await until(is_late, "the stream was read to the end, and the answer is on its way")
            await events.record([enqueued(envelope, time.time())])

            async def is_old() -> bool:
                return not was_just_made(envelope.id, time.time())

            await until(is_old, "the task is not young any more")
            proxy.resume()
            assert [status.state for status in await asking] == ["queued"]


async def test_an_answer_ends_where_it_was_asked_for(node: Node) -> None:
    """What comes after it, before the reading is ended, is not in it: who follows is told of that besides."""
    with Proxy(node.port) as proxy:
        async with events_on(node, reading_from=proxy.url) as events:
            envelope = task()
            await events.record([enqueued(envelope, time.time())])
            proxy.swallow_from(b"sentinel")
            asking = asyncio.create_task(events._reader.ask([envelope.id]))

            async def is_late() -> bool:
                return proxy.swallows

            await until(is_late, "the stream was read to the end, and the answer is on its way")
            await events.record([started(envelope, "say", time.time())])
            proxy.resume()
            known, _ = await asking
            assert known[envelope.id].state == "queued"


async def test_an_answer_may_take_longer_than_silence_may(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is much to read, and all the time something comes."""
    async with events_on(node) as events:
        envelope = task("ffffffffffff4fff8fffffffffffffff")  # it may be anywhere
        await events.record([enqueued(envelope, time.time())])
        others = [Batch(updates=[enqueued(task(), time.time())]) for _ in range(8_000)]
        await events._stream._publisher.publish([to_message(events._stream.name, batch) for batch in others])
        assert await events.read(["0" * 32]) == []  # what a question needs is open
        began = time.monotonic()
        await events.read([envelope.id])
        monkeypatch.setattr(events._stream, "timeout", (time.monotonic() - began) / 2)
        assert [status.id for status in await events.read([envelope.id])] == [envelope.id]


async def test_a_random_uuid_is_found(node: Node) -> None:
    """Together with ids that Leveret makes; who follows gets it too."""
    async with events_on(node) as events:
        envelopes = [task(), task("1fffffffffff4fff8fffffffffffffff"), task("ffffffffffff4fff8fffffffffffffff")]
        await events.record([enqueued(envelope, time.time()) for envelope in envelopes])
        ids = [envelope.id for envelope in envelopes]
        assert [status.id for status in await events.read(ids)] == ids
        for id_ in ids:
            async with asyncio.timeout(60), events.follow([id_]) as feed:
                assert [status.id for status in await anext(aiter(feed))] == [id_]


async def test_who_comes_when_the_lingering_reader_ends_is_told(node: Node) -> None:
    """It closes its channel just then, and that is nobody's end but its own."""
    async with events_on(node) as events:
        envelope = task()
        await events.record([enqueued(envelope, time.time())])
        async with events.follow([envelope.id]):
            pass
        assert events._follower._ending is not None
        events._follower._ending.cancel()
        events._follower._end_following()
        async with asyncio.timeout(60), events.follow([envelope.id]) as feed:
            news = aiter(feed)
            assert [status.state for status in await anext(news)] == ["queued"]
            await events.record([started(envelope, "say", time.time())])
            assert [status.state for status in await anext(news)] == ["running"]


async def test_a_result_that_the_server_finds_too_large_stops_nothing(node: Node) -> None:
    """Not the settling of its task, nor what else is told; whoever asks for it is told why it is not there."""
    with message_limit(node, 100_000):
        async with events_on(node) as events:
            for store in (events.record, events.notify):
                large, small = task(), task()
                async with asyncio.timeout(60):
                    await store(
                        [
                            succeeded(large, b'"' + b"x" * 200_000 + b'"'),
                            # Together more than the server takes, and each of them less.
                            *(succeeded(task(), b'"' + b"x" * 60_000 + b'"') for _ in range(2)),
                            succeeded(small, b"1"),
                        ]
                    )

                    async def is_known(id_: str = small.id) -> bool:
                        return bool(await events.read([id_]))

                    await until(is_known, "the small result is kept")
                without, kept = await events.read([large.id, small.id])
                assert bytes(kept.encoded_result) == b"1"
                assert (without.state, without.has_result) == ("succeeded", False)
                assert "is 200002 bytes, over this RabbitMQ's max_message_size" in without.problem


async def test_a_status_that_stays_too_large_is_let_go(node: Node) -> None:
    """First its traceback."""
    with message_limit(node, 10_000):
        async with events_on(node) as events:
            first, second, third = task(), task(), task()
            async with asyncio.timeout(60):
                await events.record(
                    [
                        settled(first, "say", DeadLettered("no", "x" * 10_000), time.time()),
                        settled(second, "say", DeadLettered("x" * 10_000), time.time()),
                        succeeded(third, b"1"),
                    ]
                )
                known = await events.read([first.id, second.id, third.id])
            assert [(status.id, status.error, status.traceback) for status in known] == [
                (first.id, "no", ""),
                (third.id, None, ""),
            ]


async def test_a_connection_that_is_refused_for_a_moment_ends_nothing(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """While a password is changed, say: results are stored when it is over, and who follows goes on."""
    with user_on(node, ".*", ".*", ".*") as user:
        async with events_on(node, user=user) as events:
            before, meanwhile = task(), task()
            await events.record([enqueued(before, time.time())])
            async with asyncio.timeout(60), events.follow([before.id]) as feed:
                news = aiter(feed)
                assert [status.state for status in await anext(news)] == ["queued"]
                node.ctl("change_password", user, "another")
                node.ctl("close_all_user_connections", user, "a test")
                await events.record([enqueued(meanwhile, time.time())])

                async def is_refused() -> bool:
                    return "news of tasks cannot be read" in caplog.text and "password is wrong" in caplog.text

                await until(is_refused, "who follows is refused")
                node.ctl("change_password", user, user)
                await events.record([started(before, "say", time.time())])
                assert [status.state for status in await anext(news)] == ["running"]

            async def are_known() -> bool:
                return len(await events.read([before.id, meanwhile.id])) == 2

            await until(are_known, "what was told meanwhile is stored")


async def test_a_permission_that_was_missing_is_asked_for_again(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a while, and the lack is logged once."""
    with user_on(node, "^$", "^$", ".*") as user:
        async with events_on(node, user=user) as events:
            async with asyncio.timeout(60):
                await events.record([enqueued(task(), time.time())])
                assert events._is_refused()
                monkeypatch.setattr(events, "_refused_until", float("-inf"))
                await events.record([enqueued(task(), time.time())])
                assert caplog.text.count("for want of a permission") == 1
                node.ctl("set_permissions", user, ".*", ".*", ".*")
                monkeypatch.setattr(events, "_refused_until", float("-inf"))
                late = task()
                await events.record([enqueued(late, time.time())])
                assert [status.id for status in await events.read([late.id])] == [late.id]


async def deleted(node: Node, stream: str) -> None:
    """As an operator does it who cleans up."""
    async with await aio_pika.connect(node.url) as connection:
        await (await connection.channel()).queue_delete(stream)


async def test_who_follows_hears_of_what_comes_after_the_stream_was_deleted(node: Node) -> None:
    """All who do: each task, one of them, and in another program. It is made again, whoever is the first."""
    async with events_on(node) as events, events_on(node) as others:
        envelope = task()
        for _ in range(20):  # the offsets of the new stream are lower than those of this one
            await events.record([enqueued(envelope, time.time())])
        async with (
            asyncio.timeout(60),
            events.watch() as watch,
            events.follow([envelope.id]) as feed,
            others.follow([envelope.id]) as other,
        ):
            all_news = [watch, aiter(feed), aiter(other)]
            for news in all_news[1:]:
                assert [status.state for status in await anext(news)] == ["queued"]
            await deleted(node, events._stream.name)
            assert await events.read(["0" * 32]) == []
            await events.record([started(envelope, "say", time.time())])
            for news in all_news:
                assert [status.state for status in await anext(news)] == ["running"]


async def test_who_follows_hears_of_what_comes_in_another_stream_after_a_lost_connection(node: Node) -> None:
    """It was deleted and made again, or the whole server was, and the connection was away all the time."""
    with Proxy(node.port) as proxy:
        async with events_on(node, reading_from=proxy.url) as events:
            envelope = task()
            for _ in range(20):
                await events.record([enqueued(envelope, time.time())])
            async with asyncio.timeout(100), events.watch() as watch, events.follow([envelope.id]) as feed:
                news = aiter(feed)
                assert [status.state for status in await anext(news)] == ["queued"]
                await events.record([started(envelope, "say", time.time())])
                for one in (news, watch):
                    assert [status.state for status in await anext(one)] == ["running"]
                proxy.swallow()
                proxy.cut()
                await deleted(node, events._stream.name)
                await events.record([succeeded(envelope, b"1")])
                proxy.resume()
                for one in (news, watch):
                    assert [status.state for status in await anext(one)] == ["succeeded"]


async def test_a_lost_connection_leaves_no_gap_in_the_history(node: Node) -> None:
    """Of a task that failed meanwhile, and ran again elsewhere."""
    with Proxy(node.port) as proxy:
        async with events_on(node, reading_from=proxy.url) as events:
            envelope, now = task(), time.time()
            again = msgspec.structs.replace(envelope, attempt=2)

            def told_by(worker: str, status: Status) -> Status:
                return msgspec.structs.replace(status, worker=worker)

            await events.record([enqueued(envelope, now), told_by("A", started(envelope, "say", now))])
            async with asyncio.timeout(100), events.follow([envelope.id]) as feed:
                news = aiter(feed)
                assert [status.state for status in await anext(news)] == ["running"]
                proxy.swallow()
                proxy.cut()
                await events.record(
                    [
                        told_by("A", settled(envelope, "say", Retrying("boom"), now + 1)),
                        told_by("B", started(again, "say", now + 2)),
                        told_by("B", settled(again, "say", Succeeded(b"1"), now + 3)),
                    ]
                )
                proxy.resume()
                (followed,) = await anext(news)
            assert [(moment.state, moment.attempt, moment.error) for moment in followed.history] == [
                ("queued", 1, ""),
                ("running", 1, ""),
                ("retrying", 2, "boom"),
                ("running", 2, ""),
            ]
            assert [followed] == await events.read([envelope.id])


async def test_cancelled_tasks_are_read_of_after_their_stream_was_deleted(node: Node) -> None:
    broker, other = connect(node.url, timeout=20.0), connect(node.url, timeout=20.0)
    marked: list[str] = []
    async with asyncio.timeout(60), broker.consume([Queue("work")], credit=1) as consumer:

        async def take() -> None:
            async for arrival in consumer:
                if isinstance(arrival, CancelRequests):
                    marked.extend(request.id for request in arrival.requests)

        def are_read(*ids: str) -> Callable[[], Awaitable[bool]]:
            async def are() -> bool:
                return marked[-len(ids) :] == list(ids)

            return are

        taking = asyncio.create_task(take())
        for id_ in "abcd":
            await other.control.cancel(id_)
        await until(are_read(*"abcd"), "those are read that were cancelled before")
        await deleted(node, "leveret.cancelled")
        await other.control.cancel("e")
        await until(are_read(*"abcde"), "the first in the new stream is read")
        node.ctl("close_all_connections", "a test")

        async def is_back() -> bool:
            return consumer.losses == 1 and consumer.connected

        await until(is_back, "it is connected again")
        await other.control.cancel("f")
        await until(are_read(*"abcdef"), "the next one is read after a lost connection")
    await taking
    await broker.close()
    await other.close()


async def read_and_end(line: Link, stream: str, last: int) -> None:
    """End the reading as soon as so many messages have come, of many that are on their way."""
    count = 0
    ending: list[asyncio.Task[None]] = []

    def take(_: int, __: bytes) -> None:
        nonlocal count
        count += 1
        if count == last:
            ending.append(asyncio.create_task(reading.end()))

    reading = Reading(line, stream, take)
    await reading.begin("first")

    async def has_ended() -> bool:
        return bool(ending) and ending[0].done()

    await until(has_ended, "it has ended")


async def test_a_reading_that_ends_while_more_comes_keeps_the_connection(node: Node) -> None:
    """RabbitMQ ends a connection that acknowledges on a channel after its closing."""
    async with events_on(node) as events:
        envelopes = [task() for _ in range(300)]
        await asyncio.gather(*(events.record([enqueued(one, time.time())]) for one in envelopes))
        line = await events._stream.open()
        for last in (20, 45, 49, 60, 95):
            await read_and_end(line, events._stream.name, last)
        assert (await events.read([envelopes[0].id]))[0].state == "queued"
        assert events._stream._line is line
        assert not line.is_lost, line.farewell


async def all_known(events: StatusLog, ids: Sequence[str]) -> bool:
    return [status.id for status in await events.read(ids)] == ids


async def test_a_healthy_broker_drops_no_update(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever tells more than can be sent waits."""
    async with events_on(node) as events:
        await events._stream.make()
        envelopes = [task() for _ in range(30_000)]
        for start in range(0, len(envelopes), 1_000):
            await events.notify([enqueued(one, time.time()) for one in envelopes[start : start + 1_000]])
        for start in range(0, len(envelopes), 10_000):
            ids = [one.id for one in envelopes[start : start + 10_000]]
            await until(partial(all_known, events, ids), "the last that were told are sent")
    assert "are lost" not in caplog.text


def questions_of(events: StatusLog) -> list[Sequence[str]]:
    """What is looked for in the stream from now on."""
    asked: list[Sequence[str]] = []
    ask = events._reader.ask

    async def note(ids: Sequence[str], *, to_the_end: bool = False) -> tuple[dict[str, Status], int]:
        asked.append(ids)
        return await ask(ids, to_the_end=to_the_end)

    events._reader.ask = note  # type: ignore[method-assign]
    return asked


async def test_whoever_asks_often_is_answered_from_what_comes(node: Node) -> None:
    """And hears at once what was said before the question."""
    first, second = task(), task()
    async with events_on(node) as workers, events_on(node) as events:
        await workers.record([enqueued(one, time.time()) for one in (first, second)])
        asked = questions_of(events)

        async def is_known() -> bool:
            asked.clear()
            await events.read([first.id, second.id])
            return asked == []

        await until(is_known, "nothing is looked for any more")
        for number in range(20):
            progress = msgspec.structs.replace(started(first, "say", time.time()), attempt=number + 1)
            await workers.record([progress])
            statuses = await events.read([first.id, second.id])
            assert [(status.state, status.attempt) for status in statuses] == [("running", number + 1), ("queued", 1)]
        assert asked == []


async def test_what_this_program_enqueues_while_it_listens_is_not_looked_for(node: Node) -> None:
    """Its result costs the same, whatever others do: nothing is read that was said before it was enqueued."""
    broker = connect(node.url)
    await broker.declare([Queue("work")])
    first, second, other = task(), task(), task()
    await broker.publish([first])
    async with broker.statuses.follow([first.id]):
        assert isinstance(broker, RabbitMQBroker)
        asked = questions_of(broker.statuses)
        await broker.publish([second])
        async with events_on(node) as workers:
            await workers.record([started(second, "say", time.time())])
            await workers.record([succeeded(second, b"1")])
            await workers.record([started(other, "say", time.time())])

            async def is_followed() -> bool:
                async with asyncio.timeout(60), broker.statuses.follow([second.id]) as feed:
                    return [status.state for status in await anext(feed)] == ["succeeded"]

            await until(is_followed, "what was said before it was followed is there at once")
            assert asked == []
            async with asyncio.timeout(60), broker.statuses.follow([other.id]) as feed:
                assert [status.state for status in await anext(feed)] == ["running"]
            assert asked == [[other.id]]
    await broker.close()
