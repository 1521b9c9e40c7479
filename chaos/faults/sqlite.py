"""What happens to an SQLite file, and to the processes that use it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from chaos.app import work
from chaos.faults.fault import Fault
from chaos.stage import APP, NotPossible
from leveret.errors import StoreError
from tests.support.workers import Program, leveret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chaos.stage import Stage

_SQLITE = ("sqlite",)
#: A disk that fills within seconds (bytes).
_DISK = 8 * 1024 * 1024
#: What the slow disk's stand-in does: hold the file for so long at most, again and again (seconds).
_HELD = 0.7


def random_kills(stage: Stage) -> None:
    """kill -9 of producers and workers, whichever comes up, at random moments."""
    with stage.busy():
        for _ in range(stage.profile.rounds * 4):
            stage.pause(stage.profile.between / 2)
            victim: Program
            if stage.chance.random() < 0.5:
                victim = stage.producers.pop(stage.chance.randrange(len(stage.producers)))
                victim.kill()
                stage.add_producer()
            else:
                victim = stage.workers.pop(stage.chance.randrange(len(stage.workers)))
                victim.kill_group()
                stage.add_worker()
            stage.fault_ended()
    _check_integrity(stage)


def disk_full(stage: Stage) -> None:
    """A small file system, filled up by another file while all are busy, then with room again."""
    folder = stage.folder / "disk"
    with _small_disk(folder):
        stage.url = f"sqlite:///{folder / 'leveret.db'}"
        with stage.busy():
            for _ in range(min(2, stage.profile.rounds)):
                stage.pause()
                ballast = folder / "ballast"
                _fill(ballast)
                refused = stage.book.refused
                stage.wait_for(lambda: stage.book.refused > refused, "an enqueue is refused")  # noqa: B023
                time.sleep(stage.profile.outage / 2)
                ballast.unlink()
                stage.fault_ended()
        _check_integrity(stage)


def read_only(stage: Stage) -> None:
    """Root may write what is read-only by its permissions, so the file is made immutable."""
    with stage.busy():
        stage.pause()
        path = stage.target.path
        # Not the -shm file: it is shared memory, and the kernel would end whoever writes to it.
        files = [path, path.with_name(f"{path.name}-wal")]
        _change("+i", files)
        try:
            time.sleep(stage.profile.outage)
        finally:
            _change("-i", files)
        stage.fault_ended()
    _check_integrity(stage)


def corrupted(stage: Stage) -> None:
    """Every program says so and leaves the file as it is; with the old copy in its place all is done."""
    with stage.busy():
        pass
    path = stage.target.path
    producer = stage.add_producer()
    stage.wait_for(lambda: len(stage.book.undone()) >= 50, "there is a backlog")
    stage.stop_producers()
    assert producer.exit_code() == 0
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    for damage in (_damage_header, _damage_pages):
        damage(path)
        _is_refused(stage, path)
        shutil.copy(copy, path)
    stage.fault_ended()
    stage.add_worker()
    stage.drain()
    stage.stop_workers()
    stage.note = "the damaged file was left as it was, byte for byte"


def slow_disk(stage: Stage) -> None:
    """Two workers on one file, while a third process holds it as if each of its syncs took long."""
    with stage.busy(), closing(sqlite3.connect(stage.target.path, isolation_level=None, timeout=30.0)) as database:
        ended = time.monotonic() + stage.profile.outage
        while time.monotonic() < ended:
            database.execute("BEGIN IMMEDIATE")
            database.execute("UPDATE clock SET tick = tick")
            time.sleep(stage.chance.uniform(_HELD / 4, _HELD))
            database.execute("COMMIT")
            time.sleep(0.005)
        stage.fault_ended()
    stage.note = f"a stand-in: another process holds the file, for {_HELD} s at most, again and again"


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise NotPossible(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(ballast: Path) -> None:
    """Leave no byte."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def _change(attribute: str, files: list[Path]) -> None:
    done = subprocess.run(["chattr", attribute, *map(str, files)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPossible(f"no file can be made immutable here: {done.stderr.strip()}")


def _damage_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(os.urandom(100))


def _damage_pages(path: Path) -> None:
    """All but the first page, where the schema is."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def _is_refused(stage: Stage, path: Path) -> None:
    before = path.read_bytes()
    answer = leveret("queues", "--url", stage.url, fails=True)
    assert "is damaged" in answer, answer
    worker = Program(
        ["-m", "leveret", "worker", APP, "--url", stage.url],
        stage.folder / "refused.log",
        {"LEDGER": str(stage.book.runs)},
    )
    with worker:
        assert worker.exit_code() != 0
        assert "is damaged" in worker.output, worker.output
        assert "Traceback" not in worker.output, worker.output
    try:
        stage.put(work, [(0.0,)])
    except StoreError as error:
        assert "is damaged" in str(error), error  # noqa: PT017 - no test
    else:
        raise AssertionError("a damaged file took a task")
    assert path.read_bytes() == before, "the damaged file was changed"


def _check_integrity(stage: Stage) -> None:
    path = stage.url.removeprefix("sqlite:///")
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


FAULTS = (
    Fault("random-kills", "kill -9 of producers and workers at random moments", random_kills, _SQLITE),
    Fault("disk-full", "the disk is full, then has room again", disk_full, _SQLITE),
    Fault("read-only", "the file cannot be written, then can", read_only, _SQLITE),
    Fault("corrupted", "the file is damaged, and restored from a copy", corrupted, _SQLITE),
    Fault("slow-disk", "two workers on a file that a slow disk keeps locked", slow_disk, _SQLITE),
)
