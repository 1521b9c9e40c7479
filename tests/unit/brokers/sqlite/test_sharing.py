"""Users who share a file: what lies beside it follows its mode and group, and whoever may not is told what and why."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret.brokers.sqlite.wakeup import WakeUps
from leveret.errors import StoreError
from leveret.testing.bench import batches_of
from tests.support.waiting import wait_until
from tests.unit.brokers.sqlite.test_sqlite import WORK, counts, envelope, mode, next_batch, opened

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="being several users takes root")

#: Users and a group that need not be known to the system.
ANNA, BERT, GUEST, STAFF = 54_001, 54_002, 54_003, 54_100

PROGRAM = """
import asyncio, contextlib, io, os, sys, tempfile
from pathlib import Path
from leveret.brokers.sqlite import SQLiteBroker
from leveret.errors import BrokerError
from leveret.model import Envelope, Queue, Succeeded, new_id
from leveret.testing.bench import batches_of

WORK = Queue("work")

async def store(broker):
    await broker.declare([WORK])
    await broker.publish([Envelope(new_id(), "work", "task", b"{}")])

async def look(broker):
    await broker.queues.stats()
    await broker.control.workers()
    await broker.statuses.recent(10)
    await broker.dead_letters.read("work", limit=10)
    async with broker.statuses.watch():
        pass

async def take(broker):
    async with broker.consume([WORK], credit=1) as consumer:
        print("takes", flush=True)
        async for batch in batches_of(consumer):
            await broker.settle([(delivery, Succeeded()) for delivery in batch])
            break

async def stay(broker):
    async with broker.consume([WORK], credit=1) as consumer:
        print("stays", flush=True)
        async for batch in batches_of(consumer):
            await broker.settle([(delivery, Succeeded()) for delivery in batch])

async def run(path, *does):
    broker = SQLiteBroker(Path(path), timeout=20)
    try:
        for do in does:
            await do(broker)
        print("done", flush=True)
    except BrokerError as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        await broker.close()

async def main():
    # The interpreter may be where only root can read: all that is imported late is imported once before.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        await run(f"{folder}/leveret.db", store, take, look)
    print("begins", flush=True)
    user, group, umask = map(int, sys.argv[3:])
    os.umask(umask)
    if user:
        os.setgroups([group])
        os.setgid(user)
        os.setuid(user)
    await run(sys.argv[2], globals()[sys.argv[1]])

asyncio.run(main())
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A set-group-id folder of the group, where each of its users can go."""
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    os.chown(folder, ANNA, STAFF)
    folder.chmod(0o2770)
    try:
        yield folder
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def as_user(user: int, do: str, path: Path, *, group: int = STAFF, umask: int = 0o022) -> str:
    """What a user's program says: ``store``, ``look`` or ``take``."""
    with started(user, do, path, group=group, umask=umask) as process:
        # Not `communicate`, which does not see what was read ahead with the line that it began with.
        assert process.stdout is not None
        said = process.stdout.read()
    return said.strip()


@contextmanager
def started(
    user: int, do: str, path: Path, *, group: int = STAFF, umask: int = 0o022
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command(user, do, path, group, umask),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=unmeasured(),
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line == "begins\n":
                    break
            yield process
        finally:
            process.kill()


def unmeasured() -> dict[str, str]:
    """The environment without coverage: its file is in the project's folder, where a user may not write."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}


def command(user: int, do: str, path: Path, group: int = STAFF, umask: int = 0o022) -> list[str]:
    return [sys.executable, "-c", PROGRAM, do, str(path), str(user), str(group), str(umask)]


def share(path: Path) -> None:
    assert as_user(ANNA, "store", path) == "done"
    path.chmod(0o660)
    os.chown(path, ANNA, STAFF)


@pytest.fixture
def path(shared: Path) -> Path:
    return shared / "leveret.db"


def bells(path: Path) -> Path:
    return path.with_name(f"{path.name}-consumers")


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077], ids=oct)
@pytest.mark.parametrize("folder_mode", [0o2770, 0o770], ids=oct)
def test_a_file_of_a_group_is_used_by_all_of_it(path: Path, umask: int, folder_mode: int) -> None:
    """Whoever comes first, whatever their umask, and whether or not the folder hands its group down."""
    path.parent.chmod(folder_mode)
    share(path)
    with started(BERT, "stay", path, umask=umask) as bert:
        assert bert.stdout is not None
        assert bert.stdout.readline() == "stays\n"
        assert (mode(bells(path)), bells(path).stat().st_gid) == (0o770, STAFF)
        (bell,) = bells(path).iterdir()
        assert (mode(bell), bell.stat().st_gid, bell.stat().st_uid) == (0o660, STAFF, BERT)
        for log in ("-wal", "-shm"):
            state = path.with_name(f"{path.name}{log}").stat()
            assert (state.st_mode & 0o777, state.st_gid) == (0o660, STAFF)
        assert as_user(ANNA, "store", path, umask=umask) == "done"
        assert as_user(ANNA, "look", path, umask=umask) == "done"
    # Whoever looks finds the dead one's bell, and may take it down.
    assert as_user(ANNA, "store", path, umask=umask) == "done"
    assert as_user(ANNA, "take", path, umask=umask) == "takes\ndone"
    assert list(bells(path).iterdir()) == []


def test_root_leaves_what_the_others_can_use(path: Path) -> None:
    share(path)
    assert as_user(0, "take", path) == "takes\ndone"
    assert (bells(path).stat().st_uid, bells(path).stat().st_gid, mode(bells(path))) == (ANNA, STAFF, 0o770)
    for user in (ANNA, BERT):
        assert as_user(user, "store", path) == "done"
        assert as_user(user, "take", path) == "takes\ndone"


def test_a_file_that_is_shared_later_is_shared_whole(path: Path) -> None:
    """Its owner's programs give away what they made for themselves."""
    assert as_user(ANNA, "store", path) == "done"
    with started(ANNA, "stay", path) as anna:
        assert anna.stdout is not None
        assert anna.stdout.readline() == "stays\n"
        assert mode(bells(path)) == 0o700
        path.chmod(0o660)
        for log in ("-wal", "-shm"):
            path.with_name(f"{path.name}{log}").chmod(0o660)
        os.chown(path, ANNA, STAFF)
        until_shared(bells(path))
        assert as_user(BERT, "look", path) == "done"
    assert as_user(BERT, "store", path) == "done"
    assert as_user(BERT, "take", path) == "takes\ndone"


def until_shared(folder: Path) -> None:
    wait_until(lambda: (mode(folder), folder.stat().st_gid) == (0o770, STAFF), "the folder follows the file")
    wait_until(lambda: {mode(bell) for bell in folder.iterdir()} == {0o660}, "the bells follow it too")


@pytest.mark.parametrize("do", ["store", "look", "take"])
def test_a_user_who_may_not_is_told_what_and_of_which_file(path: Path, do: str) -> None:
    share(path)
    said = as_user(GUEST, do, path, group=GUEST)
    assert said.startswith(f"StoreError: the user with the id {GUEST} may not enter {path.parent} (mode 2770")
    path.parent.chmod(0o2775)
    said = as_user(GUEST, do, path, group=GUEST)
    assert said.startswith(f"StoreError: the user with the id {GUEST} may not read and write {path} (mode 0660")
    path.chmod(0o664)
    said = as_user(GUEST, do, path, group=GUEST)
    assert said.startswith(f"StoreError: the user with the id {GUEST} may not write {path} (mode 0664")
    path.chmod(0o666)
    said = as_user(GUEST, do, path, group=GUEST)
    assert said.startswith(f"StoreError: the user with the id {GUEST} may not make files in {path.parent}")


@pytest.mark.parametrize("do", ["look", "take"])
def test_a_folder_of_bells_that_is_closed_is_named(path: Path, do: str) -> None:
    """Not the file beside it, with which all is well."""
    share(path)
    bells(path).mkdir(mode=0o700)
    os.chown(bells(path), ANNA, STAFF)
    said = as_user(BERT, do, path)
    assert said.startswith(f"StoreError: the user with the id {BERT} may not use {bells(path)}")


@pytest.mark.parametrize("log", ["-wal", "-shm"])
def test_a_log_that_is_closed_is_named(path: Path, log: str) -> None:
    share(path)
    with started(ANNA, "stay", path) as anna:
        assert anna.stdout is not None
        assert anna.stdout.readline() == "stays\n"
        path.with_name(f"{path.name}{log}").chmod(0o600)
        said = as_user(BERT, "look", path)
        assert said.startswith(f"StoreError: the user with the id {BERT} may not read and write {path}{log}")


def stop_between_transactions(program: subprocess.Popen[str], path: Path) -> None:
    """A program that is stopped in one keeps the file locked."""

    def is_stopped() -> bool:
        program.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it goes on for a moment
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                program.send_signal(signal.SIGCONT)
                return False
            other.execute("ROLLBACK")
            return True

    wait_until(is_stopped, "it is stopped, and the file is free")


def test_a_consumer_that_cannot_be_seen_is_taken_for_living(path: Path) -> None:
    share(path)
    with started(ANNA, "stay", path) as anna:
        assert anna.stdout is not None
        assert anna.stdout.readline() == "stays\n"
        (bell,) = bells(path).iterdir()
        stop_between_transactions(anna, path)  # it would have the bell follow the file again
        bell.chmod(0o600)
        said = as_user(BERT, "look", path)
        anna.send_signal(signal.SIGCONT)
        assert "cannot be seen by this user, and is taken for living" in said
        assert str(bell) in said
        assert said.endswith("done")
        assert bell.exists()


async def test_a_folder_that_a_stranger_made_beforehand_is_refused(path: Path) -> None:
    """In /tmp, say: who owns the folder owns the bells."""
    async with opened(path, WORK) as broker:
        bells(path).mkdir()
        os.chown(bells(path), GUEST, GUEST)
        bells(path).chmod(0o777)
        with pytest.raises(StoreError, match=rf"{bells(path)} belongs to the user with the id {GUEST}"):
            async with broker.consume([WORK], credit=1):
                pass


def test_another_users_file_in_a_sticky_folder_says_so(path: Path) -> None:
    assert as_user(ANNA, "store", path) == "done"
    path.chmod(0o666)
    path.parent.chmod(0o1777)
    said = as_user(BERT, "store", path, group=BERT)
    assert said == "done" or "another user's file in a folder that has the sticky bit" in said


def in_a_mount(script: str, *arguments: str) -> list[str]:
    """What programs say in a mount namespace of their own."""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = "\n" + done.stdout
    return [part.strip() for part in said.split("begins\n")[1:]]


@pytest.mark.parametrize("do", ["store", "look", "take"])
def test_a_read_only_file_system_says_so(path: Path, do: str) -> None:
    share(path)
    script = 'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"'
    (said,) = in_a_mount(script, str(path.parent), *command(0, do, path))
    assert said.startswith(f"StoreError: {path} is on a file system that is mounted read-only")


ON_A_FULL_DISK = """
folder=$1; file=$2; python=$3; program=$4
run() { "$python" -c "$program" "$1" "$file" 0 0 18; }
mount -t tmpfs -o size=600k tmpfs "$folder"
run store
dd if=/dev/zero of="$folder/full" bs=4k status=none || true
run many
run take
rm "$folder/full"
run store
run take
"""


def test_a_full_disk_says_so_and_breaks_nothing(path: Path) -> None:
    program = PROGRAM.replace(
        "async def look",
        "async def many(broker):\n"
        "    await broker.publish([Envelope(new_id(), 'work', 'task', b'x' * 300_000)])\n\n"
        "async def look",
    )
    said = in_a_mount(ON_A_FULL_DISK, str(path.parent), str(path), sys.executable, program)
    stored, full, taken, again, taken_again = said
    assert stored == again == "done"
    assert full == f"StoreError: the disk of {path} is full; nothing was stored"
    assert taken in ("takes\ndone", full)
    assert taken_again == "takes\ndone"


def test_bells_without_a_database_are_their_owners_alone(path: Path) -> None:
    held = WakeUps(path).make()
    assert (mode(bells(path)), mode(bells(path) / held.name)) == (0o700, 0o600)
    held.remove()


async def test_a_shared_file_counts_each_users_tasks(path: Path) -> None:
    share(path)
    assert as_user(BERT, "store", path) == "done"
    async with opened(path) as broker, broker.consume([WORK], credit=2) as consumer:
        await broker.publish([envelope()])
        assert len(await next_batch(batches_of(consumer))) == 2
        assert await counts(broker) == (1, 2, 0)
