"""What anybody may have written: it has bounds where it is decoded, and one bad update costs no other."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import msgspec
import pytest

from leveret.brokers import CancelRequests, connect
from leveret.brokers.memory import MemoryBroker, MemoryQueues, MemoryStatuses, MemoryStore
from leveret.brokers.queue_names import QueueNames
from leveret.brokers.rabbitmq.statuses.streams import read
from leveret.errors import QueueMismatch
from leveret.model import LATEST, Envelope, Queue, QueueStats, unix_time
from leveret.model.bounds import MAX_DEPTH, shallow
from leveret.model.reports import ChildReport, RunningTask, WorkerReport, report_of
from leveret.model.status import Status, status_of
from leveret.testing.bench import batches_of
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GOOD = b'{"id": "good", "state": "running", "at": 1764000000.5, "queue": "work"}'
#: In place of members of the above; each makes it an update that cannot be one.
BAD = (
    *('"at": 1e308', '"at": 1e999', '"at": -1', '"at": 253402300800', '"at": null', '"at": "now"', '"at": NaN'),
    *('"at": 1, "due": 1e300', '"at": 1, "started_at": -5.0', '"at": 1, "enqueued_at": 9e99', '"at": true'),
    *('"at": 1, "attempt": -1', f'"at": 1, "attempt": {2**64}', '"at": 1, "state": "done"', '"at": 1, "id": ""'),
    *(f'"at": 1, "queue": "{"é" * 200}"', f'"at": 1, "queue": "{"q" * 256}"', '"at": 1, "queue": ""'),
    *(f'"at": 1, "id": "{"i" * 300}"', f'"at": 1, "task": "{"t" * 300}"', f'"at": 1, "error": "{"e" * 200_000}"'),
    *('"at": 1, "progress": [1e999]', '"at": 1, "progress": ["a"]', f'"at": 1, "body": "{"QUFB" * 50_000}"'),
    *('"at": 1, "history": [[1e308, "queued", 1]]', '"at": 1, "history": [[1, "queued", -1]]'),
    '"at": 1, "history": [' + ",".join(['[1, "queued", 1]'] * 1_001) + "]",
    *(f'"at": 1, "other": {"[" * 50_000}{"]" * 50_000}', f'"at": 1, "result": {"[" * 50_000}{"]" * 50_000}'),
    f'"at": 1, "result": {"[" * MAX_DEPTH}{"]" * MAX_DEPTH}',
)
#: So many of these no reader takes apart.
TOO_DEEP = 3


def bad(members: str) -> bytes:
    return b'{"id": "bad", "state": "running", "queue": "work", %b}' % members.encode()


@pytest.mark.parametrize("members", BAD, ids=range(len(BAD)))
def test_a_bad_update_is_none(members: str) -> None:
    assert status_of(bad(members)) is None


@pytest.mark.parametrize("members", BAD[:-TOO_DEEP], ids=range(len(BAD) - TOO_DEEP))
def test_a_bad_update_costs_no_other(members: str) -> None:
    batch = read(b'{"v": 1, "updates": [%b, %b, 5], "sentinel": "s"}' % (bad(members), GOOD))
    # What is no JSON at all is none of it.
    assert batch is None if "NaN" in members else batch is not None
    if batch is not None:
        assert ([update.id for update in batch.updates], batch.sentinel) == (["good"], "s")


@pytest.mark.parametrize("mark", ["[5, 1]", '["a", 1e308]', '["a", -1]', '["", 1]', '["a"]', "{}"])
def test_a_bad_mark_costs_no_other(mark: str) -> None:
    batch = read(b'{"v": 1, "marks": [%b, ["good", 7.5]]}' % mark.encode())
    assert batch is not None
    assert [(one.id, one.at) for one in batch.marks] == [("good", 7.5)]


def test_what_is_within_its_bounds_is_read() -> None:
    status = Status("1", "dead", LATEST, "work", "é" * 100, 2**62 + 1, 0.0, error="e" * 20_000, body=b"b" * 2_048)
    assert status_of(msgspec.json.encode(status)) == status


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("%s", 0),
        ('"%s"', 0),
        ('[%s, "]]"]', 1),
        (r'["\\", %s, "]"]', 1),
        (r'{"\"]": [{"a\\\"": [[]], "}": %s}, 5], "": "[\\"}', 3),
        ('[[], {"a": {}}, "\u00e9[", %s]', 1),
        (f'[{"[], {}, " * 500}"{"[" * 500}", %s]', 1),
    ],
    ids=range(7),
)
@pytest.mark.parametrize(("opening", "closing"), ["[]", ('{"a": ', "}"), ('[{"]\\\\": ', "}]")])
def test_depth_is_bounded_and_nothing_else(text: str, depth: int, opening: str, closing: str) -> None:
    """The same on each Python, in each thread, and however deep the caller is: brackets in strings are no depth."""
    most = (MAX_DEPTH - depth) // (2 if "[{" in opening else 1)
    for count in (0, 1, most, most + 1, most + 50):
        middle = f"{opening * count}5{closing * count}"
        encoded = (text % middle).encode()
        if text == '"%s"':
            encoded = msgspec.json.encode(middle)
            msgspec.json.decode(shallow(encoded))
        elif count <= most:
            msgspec.json.decode(shallow(encoded))
        else:
            with pytest.raises(RecursionError, match="it is nested more than 200 deep"):
                shallow(encoded)


@pytest.mark.parametrize("one", ['"', "\\", '\\"', "[", "[]", '["', '"[', "]"])
def test_the_depth_of_what_is_made_to_take_long_is_known_soon(one: str) -> None:
    encoded = one.encode() * (1_000_000 // len(one))
    began = time.process_time()
    with suppress(RecursionError):
        shallow(b"[" * MAX_DEPTH + encoded)
    assert time.process_time() - began < 2.0  # a twentieth of it, as a rule


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, 1.0),
        (LATEST, LATEST),
        (None, None),
        (-1, None),
        (1e308, None),
        (float("nan"), None),
        ("1", None),
        (True, None),
    ],
)
def test_a_time_from_elsewhere(value: object, found: float | None) -> None:
    assert unix_time(value) == found


REPORT = WorkerReport(
    "host:1", 1.0, ["work"], [ChildReport(2, [RunningTask("1", None, "work", 1, 1.0)], 0, 0)], 0, 0, 0
)


@pytest.mark.parametrize(
    "change",
    [
        {"started_at": 1e308},
        {"finished": 2**64},
        {"waiting": -1},
        {"queues": ["é" * 200]},
        {"queues": [""]},
        {"queues": ["work"] * 20_000},
        {"name": "n" * 200_000},
        {"children": [ChildReport(-2, [], 0, 0)]},
        {"children": [ChildReport(2, [RunningTask("1", None, "work", 1, -1e300)], 0, 0)]},
    ],
)
def test_a_bad_report_is_none(change: dict[str, object]) -> None:
    assert report_of(msgspec.json.encode(REPORT)) == REPORT
    assert report_of(msgspec.json.encode(msgspec.structs.replace(REPORT, **change))) is None


async def test_a_bad_row_is_unknown_and_the_others_are_known(tmp_path: Path) -> None:
    path = tmp_path / "leveret.db"
    broker = connect(f"sqlite:///{path}")
    try:
        await broker.declare([Queue("work")])
        await broker.statuses.notify([Status("good", "running", time.time(), "work")])
        await until(lambda: broker.statuses.read(["good"]), "it is known")
        with closing(sqlite3.connect(path)) as file, file:
            file.execute(
                "INSERT INTO record (id, change, at, status) VALUES ('bad', 99, 1.0, ?)", (bad('"at": 1e308'),)
            )
            file.execute(
                "INSERT INTO task (queue, state, id, body, attempt, enqueued_at, died_at)"
                " SELECT id, 'dead', 'letter', x'7b7d', 1, -5.0, 1e308 FROM queue"
            )
        assert [one.id for one in await broker.statuses.read(["bad", "good"])] == ["good"]
        assert {one.id for one in await broker.statuses.recent(10)} == {"good", "letter"}
        (letter,) = await broker.dead_letters.read("work", limit=5)
        assert (letter.died_at, letter.envelope.enqueued_at) == (None, None)
    finally:
        await broker.close()


async def test_a_queue_that_was_only_heard_of_costs_nothing() -> None:
    class Refusing(MemoryQueues):
        async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
            if "theirs" in queues:
                raise QueueMismatch("theirs", found={}, wanted={}, remedy="use another name")
            return [QueueStats(name, 0, 0, 0, 0) for name in queues]

    store = MemoryStore()
    broker = MemoryBroker(store)
    broker.queues = Refusing(store, MemoryStatuses(store, 60.0))
    names = QueueNames(["work"])
    names.hear(["theirs", "other"])
    assert [one.name for one in await names.stats(broker)] == ["other", "work"]
    names.hear(["theirs", *map(str, range(5_000))])
    assert 500 < len(await names.stats(broker)) <= 1_001
    with pytest.raises(QueueMismatch):
        await QueueNames(["theirs"]).stats(broker)


async def test_a_mark_from_the_future_is_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "leveret.db"
    broker = connect(f"sqlite:///{path}")
    try:
        queue = Queue("work")
        await broker.declare([queue])
        async with broker.consume([queue], credit=5) as consumer:
            batches = batches_of(consumer)
            await broker.publish([Envelope("1", "work", "say", b"{}")])
            assert await anext(batches)
            with closing(sqlite3.connect(path)) as file, file:
                for id_, ahead in (("1", 3_600), ("2", 10)):
                    file.execute("INSERT INTO mark SELECT id, ?, ? FROM consumer", (id_, time.time() + ahead))
            await broker.publish([Envelope("3", "work", "say", b"{}")])
            async for arrival in consumer:
                if isinstance(arrival, CancelRequests):
                    assert [request.id for request in arrival.requests] == ["2"]
                    break
    finally:
        await broker.close()
    assert "a cancellation from more than 30 s in the future is ignored" in caplog.text


def test_the_last_time_of_all_is_shown_in_every_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the year 10000 to the east of Greenwich."""
    status = status_of(f'{{"id": "1", "state": "dead", "at": {LATEST}, "queue": "work"}}')
    try:
        with monkeypatch.context() as patched:
            patched.setenv("TZ", "Asia/Tokyo")
            time.tzset()
            assert "9999-12-31 23:59:59+00:00" in repr(status)
    finally:
        time.tzset()
