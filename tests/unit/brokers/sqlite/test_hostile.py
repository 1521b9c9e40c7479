"""Whoever may write to the file may write anything: it harms its own rows, and no other file, task or program."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret.brokers.sqlite.problems import translate
from leveret.errors import StoreError
from leveret.model import DeadLettered, Succeeded
from leveret.testing.bench import batches_of
from leveret.worker.dispatch import dead_already
from tests.support.waiting import until
from tests.unit.brokers.sqlite.test_sqlite import WORK, content, counts, envelope, names, next_batch, opened

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


def execute(path: Path, sql: str, *values: Any) -> None:
    """As another program: without Leveret's care, and without the schema's checks."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as database:
        database.execute("PRAGMA ignore_check_constraints = ON")
        database.execute(sql, values)


def bells(path: Path) -> Path:
    return path.with_name(f"{path.name}-consumers")


# Names that lead elsewhere


def link(path: Path, real: Path) -> None:
    path.symlink_to(real)


def fill(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def bind(target: Path) -> None:
    with closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(target))


AIMS: dict[str, Callable[[Path], object]] = {
    "socket": lambda target: bind(target),
    "file": lambda target: target.write_bytes(b"untouched"),
    "pipe": os.mkfifo,
    "link": lambda target: target.symlink_to(target.with_name("leveret.db")),
    "folder": lambda target: target.mkdir(),
}


def state(file: Path) -> tuple[int, int, int, bytes]:
    found = file.lstat()
    return found.st_ino, found.st_mode, found.st_mtime_ns, file.read_bytes() if stat.S_ISREG(found.st_mode) else b""


@pytest.mark.parametrize("kind", AIMS)
@pytest.mark.parametrize("where", ["../target", "target", "0123456789abcdef", "{path}"])
async def test_a_bell_is_no_way_to_another_file(
    path: Path, kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither rung nor deleted nor opened, whatever it is that the row names."""
    monkeypatch.chdir(path.parent)  # a socket's path must be short
    async with opened(path, WORK) as broker:
        async with broker.consume([WORK], credit=1):
            pass
        target = (path.parent if where.startswith(("..", "{")) else bells(path)) / (
            "target" if "target" in where or "{" in where else where
        )
        AIMS[kind](target.relative_to(path.parent) if kind == "socket" else target)
        before = state(target)
        is_bell = kind == "pipe" and where == "0123456789abcdef"
        execute(path, "INSERT INTO consumer (bell) VALUES (?)", where.format(path=target))
        execute(path, "INSERT INTO taker (queue, consumer, free, turn) VALUES (1, last_insert_rowid() + 1, 9, 0)")
        await broker.publish([envelope()])
        await broker.queues.stats()
        await broker.control.workers()
        assert is_bell or state(target) == before
        async with broker.consume([WORK], credit=1) as consumer:
            (delivery,) = await next_batch(batches_of(consumer))
            await broker.settle([(delivery, Succeeded())])
        assert is_bell or state(target) == before
        assert await counts(broker) == (0, 0, 0)


async def test_a_folder_of_bells_that_is_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    aim = tmp_path / "aim"
    aim.mkdir()
    bells(path).symlink_to(aim)
    async with opened(path, WORK) as broker:
        with pytest.raises(StoreError, match=r"leveret\.db.*symbolic link"):
            async with broker.consume([WORK], credit=1):
                pass
        assert names(aim) == []


async def test_a_bell_that_others_hold_and_do_not_read_stops_nobody(path: Path) -> None:
    async with opened(path, WORK) as broker:
        async with broker.consume([WORK], credit=1):
            pass
        bell = bells(path) / "0123456789abcdef"
        os.mkfifo(bell)
        reader = os.open(bell, os.O_RDONLY | os.O_NONBLOCK)
        execute(path, "INSERT INTO consumer (bell) VALUES ('0123456789abcdef')")
        execute(path, "INSERT INTO taker (queue, consumer, free, turn) VALUES (1, 2, NULL, 0)")
        for _ in range(70):
            await broker.publish([envelope() for _ in range(1_000)])
        os.close(reader)
        async with broker.consume([WORK], credit=1) as consumer:
            assert len(await next_batch(batches_of(consumer))) == 1


# Rows

BAD_ROWS = {
    "body as text": ("UPDATE task SET body = '{}' WHERE seq = 1", "body is TEXT and must be a BLOB"),
    "body as a number": ("UPDATE task SET body = 7 WHERE seq = 1", "body is an INTEGER"),
    "headers that are none": ("UPDATE task SET headers = x'c1ff00' WHERE seq = 1", "headers are no msgpack map"),
    "headers as text": ("UPDATE task SET headers = 'a' WHERE seq = 1", "headers is TEXT"),
    "deep headers": (
        f"UPDATE task SET headers = x'81a161{'91' * 32}c0' WHERE seq = 1",
        "headers are nested more than 32 deep",
    ),
    "deeper headers": (
        f"UPDATE task SET headers = x'81a161{'91' * 50_000}c0' WHERE seq = 1",
        "headers are n",  # whether they are decoded at all depends on the Python
    ),
    "headers of a list": ("UPDATE task SET headers = x'93010203' WHERE seq = 1", "headers are no msgpack map"),
    "headers without end": ("UPDATE task SET headers = zeroblob(3000) WHERE seq = 1", "headers are no msgpack map"),
    "name as a blob": ("UPDATE task SET name = x'ff00' WHERE seq = 1", "name is a BLOB"),
    "content type as a blob": ("UPDATE task SET content_type = x'ff' WHERE seq = 1", "content_type is a BLOB"),
    "id as a blob": ("UPDATE task SET id = x'00ff' WHERE seq = 1", "id is a BLOB"),
    "attempt as text": ("UPDATE task SET attempt = 'first' WHERE seq = 1", "attempt is TEXT"),
    "attempt that is huge": (
        "UPDATE task SET attempt = 9223372036854775807 WHERE seq = 1",
        "attempt is 9223372036854775807",
    ),
    "attempt 0": ("UPDATE task SET attempt = 0 WHERE seq = 1", "attempt is 0"),
    "time without end": ("UPDATE task SET enqueued_at = 9e999 WHERE seq = 1", "enqueued_at is inf"),
    "time as text": ("UPDATE task SET expires_at = 'soon' WHERE seq = 1", "expires_at is TEXT"),
    "time before all": ("UPDATE task SET expires_at = -9e999 WHERE seq = 1", "expires_at is -inf"),
    "error as a blob": ("UPDATE task SET last_error = x'ff' WHERE seq = 1", "last_error is a BLOB"),
    "priority as text": ("UPDATE task SET priority = 'high' WHERE seq = 1", "priority is TEXT"),
    "priority that is huge": (
        "UPDATE task SET priority = 4611686018427387904 WHERE seq = 1",
        "priority is 4611686018427387904",
    ),
    "due as text": ("UPDATE task SET due = 'soon', state = 'delayed' WHERE seq = 1", "due is TEXT"),
    "due never": ("UPDATE task SET due = 9e999, state = 'delayed' WHERE seq = 1", "due is inf"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
async def test_one_bad_row_is_one_bad_dead_letter(path: Path, case: str) -> None:
    """With its reason; what stands behind it runs, and each view shows the rest."""
    sql, problem = BAD_ROWS[case]
    async with opened(path, WORK) as broker:
        await broker.publish([envelope(body=b"bad"), envelope(body=b"good")])
        execute(path, sql)
        assert len(await broker.statuses.recent(10)) == 2
        async with broker.consume([WORK], credit=None) as consumer:
            found: dict[bytes, str] = {}
            async for batch in batches_of(consumer):
                for delivery in batch:
                    # As a worker does, whose children read it.
                    msgspec.msgpack.decode(msgspec.msgpack.encode(delivery.envelope), type=type(delivery.envelope))
                    outcome = dead_already(delivery, 0.0) or Succeeded()
                    found[delivery.envelope.body] = outcome.reason if isinstance(outcome, DeadLettered) else "ran"
                    await broker.settle([(delivery, outcome)])
                if len(found) == 2:
                    break
        assert found.pop(b"good") == "ran"
        ((_, reason),) = found.items()
        assert reason.startswith("its row in the file cannot be read: ")
        assert problem in reason
        assert await counts(broker) == (0, 0, 1)
        (letter,) = await broker.dead_letters.read("work", limit=10)
        assert letter.reason == reason
        assert [status.id for status in await broker.statuses.read([letter.envelope.id])] == [letter.envelope.id]
        assert [status.state for status in await broker.statuses.recent(10)] == ["dead"]
        assert await broker.dead_letters.drop("work", [letter.envelope.id]) == [letter.envelope.id]
        assert await counts(broker) == (0, 0, 0)


BAD_STATES = {
    "a queue's name": "INSERT INTO queue (name) VALUES (x'ff00')",
    "a queue's limit": "INSERT INTO queue (name, max_length) VALUES ('odd', 'many')",
    "a queue that is paused somehow": "INSERT INTO queue (name, paused) VALUES ('odd', x'01')",
    "no UTF-8 in a queue's name": "INSERT INTO queue (name) VALUES (CAST(x'fffe' AS TEXT))",
    "no UTF-8 in a task": (
        "INSERT INTO task (queue, id, name, body, attempt) VALUES (1, 'odd', CAST(x'ff' AS TEXT), x'', 1)"
    ),
    "a task of no queue": "INSERT INTO task (queue, id, body, attempt) VALUES (99, 'odd', x'', 1)",
    "a task in no state": "INSERT INTO task (queue, id, body, attempt, state) VALUES (1, 'odd', x'', 1, 'gone')",
    "a task of no consumer": (
        "INSERT INTO task (queue, id, body, attempt, state, consumer, token)"
        " VALUES (1, 'odd', x'', 1, 'running', 99, 1)"
    ),
    "a task that nobody runs": (
        "INSERT INTO task (queue, id, body, attempt, state, consumer) VALUES (1, 'odd', x'', 1, 'running', NULL)"
    ),
    "the last number": (
        "INSERT INTO task (seq, queue, id, body, attempt) VALUES (9223372036854775807, 1, 'odd', x'', 1)"
    ),
    "a dead letter": (
        "INSERT INTO task (queue, id, body, attempt, state, reason, traceback, died_at, worker)"
        " VALUES (1, x'aa', 'text', 'x', 'dead', x'ff', 7, 'then', x'01')"
    ),
    "a status": "INSERT INTO record (id, change, at, status) VALUES ('odd', 1, 1, x'ff')",
    "a status of another time": (
        "INSERT INTO record (id, change, at, status)"
        ' VALUES (\'odd\', 1, 1, \'{"id":"odd","state":"queued","at":1e308,"queue":"work"}\')'
    ),
    "a mark": "INSERT INTO mark (consumer, task, at) VALUES (1, 'odd', 'then')",
    "an answer": "INSERT INTO question (asker, consumer, answer) VALUES (2, 1, x'ff')",
    "credit": "INSERT INTO taker (queue, consumer, free, turn) VALUES (1, 77, 'all', 0)",
    "more credit": "INSERT INTO taker (queue, consumer, free, turn) VALUES (1, 77, 9223372036854775807, 0)",
    "a consumer": "INSERT INTO consumer (bell) VALUES (x'ff')",
}


@pytest.mark.parametrize("case", BAD_STATES)
async def test_a_bad_row_anywhere_stops_nobody(path: Path, case: str) -> None:
    """What can be looked at is, tasks run, and tasks are stored."""
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        execute(path, BAD_STATES[case])
        batches = batches_of(consumer)
        mine = [envelope(body=b"mine") for _ in range(3)]
        await broker.publish(mine)
        assert "work" in [one.name for one in await broker.queues.stats()]
        await broker.control.workers()
        await broker.statuses.recent(100)
        await broker.statuses.read(["odd"])
        await broker.control.cancel("nothing")
        await broker.dead_letters.read("work", limit=10)
        async with broker.statuses.watch():
            pass
        done: set[str] = set()
        while len(done) < 3:
            for delivery in await next_batch(batches):
                await broker.settle([(delivery, dead_already(delivery, 0.0) or Succeeded())])
                if delivery.envelope.body == b"mine":
                    done.add(delivery.envelope.id)
        assert done == {one.id for one in mine}


BAD_DEAD_LETTERS = {
    "no UTF-8 in an id": "UPDATE task SET id = CAST(x'80' AS TEXT)",
    "a blob as an id": "UPDATE task SET id = x'80'",
    "the last number": "UPDATE task SET seq = 9223372036854775807",
}


@pytest.mark.parametrize("case", BAD_DEAD_LETTERS)
async def test_a_bad_dead_letter_is_put_back_and_dropped_as_others_are(path: Path, case: str) -> None:
    """Without a worker, that would have mended it."""
    async with opened(path, WORK) as broker:
        await broker.publish([envelope()])
        execute(path, "UPDATE task SET state = 'dead', died_at = 1")
        execute(path, BAD_DEAD_LETTERS[case])
        (letter,) = await broker.dead_letters.read("work", limit=10)
        assert await broker.dead_letters.retry("work", [letter.envelope.id]) == [letter.envelope.id]
        assert await counts(broker) == (1, 0, 0)
        execute(path, "UPDATE task SET state = 'dead', died_at = 1")
        execute(path, BAD_DEAD_LETTERS[case])
        (letter,) = await broker.dead_letters.read("work", limit=10)
        assert await broker.dead_letters.drop("work", [letter.envelope.id]) == [letter.envelope.id]
        assert await counts(broker) == (0, 0, 0)


async def test_a_task_of_no_consumer_runs(path: Path) -> None:
    async with opened(path, WORK) as broker:
        execute(path, BAD_STATES["a task of no consumer"])
        execute(path, BAD_STATES["a task that nobody runs"].replace("odd", "odder"))
        async with broker.consume([WORK], credit=2) as consumer:
            batches = batches_of(consumer)
            found: list[str] = []
            while len(found) < 2:
                found += [delivery.envelope.id for delivery in await next_batch(batches)]
            assert sorted(found) == ["odd", "odder"]


@pytest.mark.parametrize(
    "odd",
    [
        "UPDATE sqlite_sequence SET seq = 9223372036854775807",
        "INSERT INTO consumer VALUES (9223372036854775807, 'x', 0)",
    ],
    ids=["the last number is given", "a consumer has it"],
)
async def test_consumers_go_on_when_their_numbers_are_used_up(path: Path, odd: str) -> None:
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as first:
        execute(path, odd)
        await broker.publish([envelope("work"), envelope("work")])
        found = {delivery.envelope.id for delivery in await next_batch(batches_of(first))}
        async with opened(path, WORK) as other, other.consume([WORK], credit=1) as second:
            found |= {delivery.envelope.id for delivery in await next_batch(batches_of(second))}
        assert len(found) == 2


async def test_a_file_that_is_full_on_a_disk_that_is_not_says_so(path: Path) -> None:
    async with opened(path, WORK):
        execute(path, "CREATE TABLE odd (id INTEGER PRIMARY KEY AUTOINCREMENT)")
        execute(path, "INSERT INTO odd VALUES (9223372036854775807)")
        with closing(sqlite3.connect(path)) as database, pytest.raises(sqlite3.OperationalError) as caught:
            database.execute("INSERT INTO odd DEFAULT VALUES")
        assert "its disk is not full" in str(translate(caught.value, path))


# The schema

CHANGED = {
    "version below 0": ("PRAGMA user_version = -5", "PRAGMA user_version) is -5"),
    "no version": ("PRAGMA user_version = 0", "PRAGMA user_version) is 0"),
    "a later version": ("PRAGMA user_version = 99", "was written by a newer Leveret"),
    "no table": ("DROP TABLE taker", "it has no table 'taker'"),
    "a view": ("CREATE VIEW task AS SELECT 1", "'task' is a view, not a table"),
    "no column": ("ALTER TABLE task DROP COLUMN headers", "the table 'task' has no column 'headers'"),
    "another name": ("ALTER TABLE record RENAME TO records", "it has no table 'record'"),
    "no index": ("DROP INDEX task_id", "it has no index 'task_id'"),
    "a trigger": ("CREATE TRIGGER t AFTER INSERT ON task BEGIN DELETE FROM task; END", "has a trigger, 't'"),
    "no clock": ("DELETE FROM clock", "the table 'clock' must have one row"),
    "two clocks": ("INSERT INTO clock VALUES (7)", "the table 'clock' must have one row"),
    "a clock that stops": ("UPDATE clock SET tick = 9223372036854775807", "the table 'clock' must have one row"),
}


@pytest.mark.parametrize("case", CHANGED)
async def test_a_changed_schema_is_a_clear_error(path: Path, case: str) -> None:
    sql, told = CHANGED[case]
    async with opened(path, WORK):
        pass
    if case == "a view":
        execute(path, "DROP TABLE task")
    execute(path, sql)
    before = content(path)
    async with opened(path) as broker:
        for attempt in (lambda: broker.declare([WORK]), lambda: broker.publish([envelope()]), broker.queues.stats):
            with pytest.raises(StoreError) as caught:
                await attempt()
            assert told in str(caught.value)
            assert str(path) in str(caught.value)
    assert content(path) == before


@pytest.mark.parametrize("case", ["no table", "a trigger", "no column", "a later version"])
async def test_a_schema_that_is_changed_under_a_program_is_seen(path: Path, case: str) -> None:
    sql, told = CHANGED[case]
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        reading = asyncio.ensure_future(next_batch(batches_of(consumer)))
        execute(path, sql)
        if case == "a later version":
            execute(path, "CREATE TABLE later (x)")
        with pytest.raises(StoreError) as caught:
            await broker.publish([envelope()])
        assert told in str(caught.value)

        async def is_off() -> bool:
            return not consumer.connected

        await until(is_off, "nothing comes")
        reading.cancel()


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
async def test_what_is_no_file_says_what_it_is(path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    if kind == "device":
        link(path, Path("/dev/null"))
    else:
        AIMS[kind](path.relative_to(path.parent) if kind == "socket" else path)
    async with opened(path) as broker:
        with pytest.raises(StoreError, match=rf"is not a file but a (named )?{kind}"):
            await broker.declare([WORK])


async def test_an_encrypted_file_says_so(path: Path) -> None:
    fill(path, os.urandom(8_192))
    async with opened(path) as broker:
        with pytest.raises(StoreError, match="encrypted"):
            await broker.declare([WORK])
