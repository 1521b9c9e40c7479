"""One file has one name: what happens when it has two, or is removed, replaced, moved or restored while it is used."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from leveret.errors import LeaseLost, StoreError
from leveret.model import Queue, Succeeded
from leveret.model.status import started
from leveret.testing.bench import batches_of
from tests.support.waiting import until
from tests.unit.brokers.sqlite.test_sqlite import WORK, counts, envelope, names, next_batch, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from leveret.brokers import Consumer
    from leveret.brokers.sqlite import SQLiteBroker
    from leveret.model import Delivery


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}{ending}")


def files(path: Path) -> list[Path]:
    return [path, beside(path, "-wal"), beside(path, "-shm")]


def folders(*paths: Path) -> None:
    for path in paths:
        path.mkdir()


def link(path: Path, real: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(real)


def exists(path: Path) -> bool:
    return path.exists()


async def backed_up(copy: Path, *bodies: bytes) -> None:
    """A whole file of its own with these tasks."""
    async with opened(copy, Queue("other"), WORK) as broker:
        await broker.publish([envelope(body=body) for body in bodies])
    assert not exists(beside(copy, "-wal"))


def integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        return str(database.execute("PRAGMA integrity_check").fetchone()[0])


async def bodies_of(batches: AsyncIterator[Sequence[Delivery]], broker: SQLiteBroker, count: int) -> list[bytes]:
    """So many tasks are taken and done."""
    found: list[bytes] = []
    while len(found) < count:
        for delivery in await next_batch(batches):
            try:
                await broker.settle([(delivery, Succeeded())])
            except LeaseLost:
                continue
            found.append(delivery.envelope.body)
    return found


# Two names


async def test_a_hard_link_is_refused_with_the_remedy(path: Path) -> None:
    async with opened(path, WORK):
        pass
    other = path.with_name("other.db")
    os.link(path, other)
    for name in (path, other):
        async with opened(name) as broker:
            with pytest.raises(StoreError, match=r"has 2 names \(hard links\).*delete the others .*-inum \d+"):
                await broker.publish([envelope()])
    assert names(path.parent) == ["leveret.db", "other.db"]
    other.unlink()
    async with opened(path, WORK) as broker:
        await broker.publish([envelope()])


async def test_a_symbolic_link_is_the_file_that_it_leads_to(path: Path, tmp_path: Path) -> None:
    """Its log is there too, so both names are one queue, and each may come first."""
    real = tmp_path / "data" / "real.db"
    folders(real.parent)
    link(path, real)
    async with opened(path, WORK) as broker, opened(real) as other:
        await broker.publish([envelope()])
        async with other.consume([WORK], credit=1) as consumer:
            assert len(await next_batch(batches_of(consumer))) == 1
            assert await counts(broker) == (0, 1, 0)
        assert exists(beside(real, "-wal"))
        assert names(tmp_path) == ["data", "leveret.db"]


async def test_a_symbolic_link_that_leads_elsewhere_is_followed(path: Path, tmp_path: Path) -> None:
    """As with an application that is deployed anew, under a link that is switched."""
    for number in ("1", "2"):
        folders(tmp_path / number)
        async with opened(tmp_path / number / "real.db", WORK):
            pass
    link(path, tmp_path / "1" / "real.db")
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        batches = batches_of(consumer)
        link(path, tmp_path / "2" / "real.db")
        async with opened(tmp_path / "2" / "real.db", WORK) as second:
            await second.publish([envelope(body=b"second")])
            assert await bodies_of(batches, broker, 1) == [b"second"]
        assert len(names(tmp_path / "2" / "real.db-consumers")) == 1


IN_A_MOUNT = """
import asyncio, subprocess, sys
from pathlib import Path
from leveret.brokers.sqlite import SQLiteBroker
from leveret.errors import StoreError
from leveret.model import Envelope, Queue, new_id

async def main():
    source, target = sys.argv[1:3]
    subprocess.run(["mount", "--bind", source, target], check=True)
    broker = SQLiteBroker(Path(sys.argv[3]), timeout=20)
    try:
        await broker.declare([Queue("work")])
        await broker.publish([Envelope(new_id(), "work", "task", b"{}")])
        print("stored")
    except StoreError as error:
        print(error)
    finally:
        await broker.close()

asyncio.run(main())
"""
IS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


def within_a_mount(source: Path, target: Path, database: Path) -> str:
    """What a program of another mount namespace says, as in a container."""
    command = ["unshare", "-m", sys.executable, "-c", IN_A_MOUNT, str(source), str(target), str(database)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@IS_ROOT
@pytest.mark.parametrize("name", ["leveret.db", "with space.db"])
async def test_a_file_that_is_mounted_alone_is_refused(tmp_path: Path, name: str) -> None:
    """Its log would be in the container, and the others' beside the file."""
    path, target = tmp_path / "host" / name, tmp_path / "container" / name
    folders(path.parent, target.parent)
    async with opened(path, WORK) as broker:
        target.touch()
        said = within_a_mount(path, target, target)
        assert said.startswith(f"{target} is a mount of its own")
        assert said.endswith("mount the folder that holds it, not the file alone")
        assert await counts(broker) == (0, 0, 0)
    assert names(target.parent) == [name]


@IS_ROOT
async def test_a_folder_that_is_mounted_elsewhere_is_fine(tmp_path: Path) -> None:
    path, target = tmp_path / "host" / "leveret.db", tmp_path / "container"
    folders(path.parent)
    folders(target)
    async with opened(path, WORK) as broker:
        assert within_a_mount(path.parent, target, target / path.name) == "stored"
        assert await counts(broker) == (1, 0, 0)


# Away, and back


def unlink(path: Path) -> None:
    for file in files(path):
        file.unlink(missing_ok=True)


def unlink_alone(path: Path) -> None:
    path.unlink()


def move_away(path: Path) -> None:
    path.rename(path.with_name("away"))


def move_folder(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("take", [unlink, unlink_alone, move_away, move_folder])
async def test_nothing_is_said_to_be_stored_in_a_file_that_is_gone(
    tmp_path: Path, take: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "folder" / "leveret.db"
    folders(path.parent)
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        reading = asyncio.ensure_future(next_batch(batches_of(consumer)))
        take(path)
        for _ in range(3):
            with pytest.raises(StoreError, match=r"was removed or moved away while this program used it"):
                await broker.publish([envelope()])

        async def is_away() -> bool:
            return not consumer.connected

        await until(is_away, "the consumer says that nothing comes")
        await asyncio.sleep(1.2)  # two rounds more, in which nothing is said again
        assert not exists(path)
        reading.cancel()
    assert sum("no tasks can be taken" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("take", [move_away, move_folder])
async def test_a_file_that_is_back_goes_on_as_if_nothing_had_been(tmp_path: Path, take: Callable[[Path], None]) -> None:
    """What runs is not run again, and its outcome waits for the file."""
    path = tmp_path / "folder" / "leveret.db"
    folders(path.parent)
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        batches = batches_of(consumer)
        await broker.publish([envelope(body=b"1"), envelope(body=b"2")])
        (running,) = await next_batch(batches)
        reading = asyncio.ensure_future(next_batch(batches))
        take(path)

        async def is_away() -> bool:
            return not consumer.connected

        await until(is_away, "the consumer says that nothing comes")
        settling = asyncio.ensure_future(broker.settle([(running, Succeeded())]))
        done, _ = await asyncio.wait([settling], timeout=0.7)
        assert not done
        if take is move_folder:
            path.parent.with_name("elsewhere").rename(path.parent)
        else:
            path.with_name("away").rename(path)
        await settling
        (second,) = await reading
        assert second.envelope.body == b"2"
        assert second.returns == 0
        assert consumer.connected
        assert consumer.losses == 0
        await broker.settle([(second, Succeeded())])
        assert await counts(broker) == (0, 0, 0)
    assert integrity(path) == "ok"


async def test_a_broker_is_closed_though_its_file_is_away(path: Path) -> None:
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        await broker.publish([envelope()])
        (running,) = await next_batch(batches_of(consumer))
        unlink(path)
        settling = asyncio.ensure_future(broker.settle([(running, Succeeded())]))
        await asyncio.sleep(0.1)  # it waits for the file by now, or will: both must end
        await broker.close()
        with pytest.raises((StoreError, LeaseLost)):
            await settling
    assert not exists(path)


async def test_a_program_that_begins_makes_a_new_file_and_the_others_use_it(path: Path) -> None:
    """The queues that they declared are made there too."""
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        unlink(path)
        async with opened(path, Queue("first"), WORK) as beginner:
            await beginner.publish([envelope(body=b"new")])
            assert await bodies_of(batches_of(consumer), broker, 1) == [b"new"]
            await broker.publish([envelope(body=b"newer")])
            assert await bodies_of(batches_of(consumer), broker, 1) == [b"newer"]
        assert consumer.losses == 1


async def test_a_producers_queue_is_made_in_the_file_that_replaced_its_own(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with opened(copy, Queue("other")):
        pass
    async with opened(path, WORK) as broker:
        copy.replace(path)
        await broker.publish([envelope()])
        assert await counts(broker) == (1, 0, 0)


# Replaced


async def test_a_backup_that_replaces_the_file_is_used(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the other one's log beside it, which SQLite alone would write into it."""
    copy = tmp_path / "copy.db"
    await backed_up(copy, b"a", b"b", b"c")
    async with (
        opened(path, WORK) as broker,
        opened(path, WORK) as producer,
        broker.consume([WORK], credit=1) as consumer,
    ):
        batches = batches_of(consumer)
        await producer.publish([envelope(body=b"old" * 1000) for _ in range(50)])
        (old,) = await next_batch(batches)
        copy.replace(path)
        assert await bodies_of(batches, broker, 3) == [b"a", b"b", b"c"]
        with pytest.raises(LeaseLost):
            await broker.settle([(old, Succeeded())])
        await producer.publish([envelope(body=b"new")])
        assert await bodies_of(batches, broker, 1) == [b"new"]
        assert consumer.connected
        assert consumer.losses == 1
    assert integrity(path) == "ok"
    aside = [name for name in names(tmp_path) if ".of-replaced-" in name]
    assert len(aside) == 1
    assert aside[0] in caplog.text
    assert "is another file now, and is used from now on" in caplog.text


async def test_an_old_lease_settles_nothing_in_another_file(path: Path, tmp_path: Path) -> None:
    """There the same numbers are another consumer's, and other tasks'."""
    copy = tmp_path / "copy.db"
    async with opened(copy, WORK) as other:
        await other.publish([envelope(body=b"theirs")])
        leaving = other.consume([WORK], credit=1)
        theirs = await leaving.__aenter__()
        assert len(await next_batch(batches_of(theirs))) == 1
        with closing(sqlite3.connect(copy)) as database:
            database.execute(f"VACUUM INTO '{tmp_path / 'third.db'}'")
        await leaving.__aexit__(None, None, None)
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        await broker.publish([envelope(body=b"ours")])
        (ours,) = await next_batch(batches_of(consumer))
        (tmp_path / "third.db").replace(path)
        with pytest.raises(LeaseLost):
            await broker.settle([(ours, Succeeded())])
        assert await bodies_of(batches_of(consumer), broker, 1) == [b"theirs"]


async def test_a_backup_that_is_restored_into_the_file_is_read_anew(path: Path, tmp_path: Path) -> None:
    """The queues have other numbers there, and the consumers are not registered."""
    copy = tmp_path / "copy.db"
    await backed_up(copy, b"a")
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        batches = batches_of(consumer)
        await broker.publish([envelope(body=b"old")])
        (old,) = await next_batch(batches)
        with closing(sqlite3.connect(copy)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)
        await broker.publish([envelope(body=b"b")])
        assert await bodies_of(batches, broker, 2) == [b"a", b"b"]
        with pytest.raises(LeaseLost):
            await broker.settle([(old, Succeeded())])
    assert integrity(path) == "ok"


async def test_whoever_follows_hears_of_the_file_that_replaced_it(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    await backed_up(copy)
    async with opened(path, WORK) as broker, broker.statuses.watch() as watch:
        copy.replace(path)
        async with opened(path, WORK) as other:
            told: list[str] = []

            async def read() -> None:
                async for statuses in watch:
                    told.extend(status.id for status in statuses)

            reading = asyncio.ensure_future(read())
            task = envelope()

            async def is_told() -> bool:
                await other.statuses.notify([started(task, "task", 1.0)])
                return task.id in told

            await until(is_told, "it is told of")
            reading.cancel()


# The log


@pytest.mark.parametrize("endings", [["-wal"], ["-shm"], ["-wal", "-shm"]], ids="+".join)
async def test_a_log_that_was_deleted_costs_nothing(
    path: Path, endings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What it held is written into the file by whoever sees it first, before anybody begins another."""
    async with opened(path, WORK) as broker, opened(path, WORK) as other:
        await broker.publish([envelope(body=b"1")])
        await other.publish([envelope(body=b"2")])
        for ending in endings:
            beside(path, ending).unlink()
        await other.publish([envelope(body=b"3")])
        await broker.publish([envelope(body=b"4")])
        async with opened(path) as third:
            assert await counts(third) == (4, 0, 0)
        async with broker.consume([WORK], credit=1) as consumer:
            assert sorted(await bodies_of(batches_of(consumer), broker, 4)) == [b"1", b"2", b"3", b"4"]
    assert integrity(path) == "ok"
    assert "has lost its -wal or -shm file" in caplog.text
    assert "nothing was lost" in caplog.text


STORES = """
import asyncio, sys
from pathlib import Path
from leveret.brokers.sqlite import SQLiteBroker
from leveret.model import Envelope, new_id

async def main():
    broker = SQLiteBroker(Path(sys.argv[1]), timeout=20)
    await broker.publish([Envelope(new_id(), "work", "task", b"2")])
    print("stored", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await broker.close()

asyncio.run(main())
"""


async def test_a_log_that_another_program_has_begun_anew_is_used(path: Path) -> None:
    """What was in the deleted one alone is lost; the file stays whole, and all see the same again."""
    async with opened(path, WORK) as broker:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint")  # so that the other program finds a queue
        await broker.publish([envelope(body=b"1")])
        for ending in ("-wal", "-shm"):
            beside(path, ending).unlink()
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", STORES, str(path), stdin=pipe, stdout=pipe)
        assert process.stdin is not None
        assert process.stdout is not None
        assert await process.stdout.readline() == b"stored\n"
        await broker.publish([envelope(body=b"3")])
        process.stdin.close()
        assert await process.wait() == 0
        async with broker.consume([WORK], credit=1) as consumer:
            assert {b"2", b"3"} <= set(await bodies_of(batches_of(consumer), broker, 2))
    assert integrity(path) == "ok"


async def connected(consumer: Consumer) -> bool:
    return consumer.connected


async def test_a_damaged_file_is_said_once_and_is_used_when_it_is_mended(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy.db"
    await backed_up(copy, b"a")
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        reading = asyncio.ensure_future(next_batch(batches_of(consumer)))
        damaged = tmp_path / "damaged.db"
        shutil.copy(copy, damaged)
        with damaged.open("r+b") as file:
            file.seek(4_096)
            file.write(b"\xa5" * (damaged.stat().st_size - 4_096))
        damaged.replace(path)

        async def is_off() -> bool:
            return not consumer.connected

        await until(is_off, "nothing comes")
        await asyncio.sleep(1.2)  # two rounds more, in which nothing is said again
        assert not consumer.connected
        copy.replace(path)
        (delivery,) = await reading
        assert delivery.envelope.body == b"a"
        reading = asyncio.ensure_future(next_batch(batches_of(consumer)))
        await until(lambda: connected(consumer), "it looks again, and sees that it works")
        await broker.settle([(delivery, Succeeded())])
        reading.cancel()
    assert sum("no tasks can be taken" in message for message in caplog.messages) <= 2
