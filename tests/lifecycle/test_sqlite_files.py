"""A worker whose SQLite file is taken away, replaced or damaged: its probes tell the truth, its log says it once."""

from __future__ import annotations

import shutil
import sqlite3
import urllib.error
import urllib.request
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from leveret.model import status_of
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.nodes import free_ports
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Probed:
    """A worker, the file that it uses and its probes."""

    def __init__(self, folder: Path, ledger: Ledger) -> None:
        self.path = folder / "leveret.db"
        self.ledger = ledger
        self._address = f"127.0.0.1:{free_ports(1)[0]}"
        self.client = Client(f"sqlite:///{self.path}")
        # A fixed one: else a line says now and then that it could not be changed.
        self.worker = Worker(self.client.url, ledger, "--metrics", self._address, "--prefetch", "10")

    def probe(self, page: str) -> int:
        try:
            with urllib.request.urlopen(f"http://{self._address}{page}", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    def wait_until_ready(self, *, ready: bool = True) -> None:
        wanted = 200 if ready else 503
        wait_until(lambda: self.probe("/ready") == wanted, f"/ready says {wanted}")
        assert self.probe("/live") == 200

    def runs(self, text: str) -> None:
        self.client.enqueue(ledger_app.say, text)
        self.ledger.wait_for(f"said {text}")


@pytest.fixture
def probed(tmp_path: Path, ledger: Ledger) -> Iterator[Probed]:
    folder = tmp_path / "queue"
    folder.mkdir()
    probed = Probed(folder, ledger)
    with probed.worker.ready():
        probed.wait_until_ready()
        yield probed


def rounds(probed: Probed) -> None:
    """Another worker on a file of its own has looked around some times: this one would have too."""
    other = Ledger(probed.path.with_name("other-ledger"))
    with Worker(f"sqlite:///{probed.path.with_name('other.db')}", other).ready():
        pass


def is_told(path: Path, state: str) -> bool:
    with closing(sqlite3.connect(path)) as database:
        return any(
            status is not None and status.state == state
            for status in (status_of(row) for (row,) in database.execute("SELECT status FROM record"))
        )


def test_a_worker_whose_file_is_moved_away_says_so_and_goes_on_when_it_is_back(probed: Probed) -> None:
    probed.client.enqueue(ledger_app.held, "long")
    probed.ledger.wait_for("start long")
    # That it runs is told a moment later; else a line would say that it could not be.
    wait_until(lambda: is_told(probed.path, "running"), "it is told that the task runs")
    away = probed.path.with_name("away")
    probed.path.rename(away)
    probed.wait_until_ready(ready=False)
    probed.ledger.release("long")
    probed.ledger.wait_for("end long")
    probed.ledger.wait_for("end long")
    rounds(probed)
    said = [line for line in probed.worker.output.splitlines() if "was removed or moved away" in line]
    # Once, not every half second; the outcome waits without a word.
    assert len(said) == 1, [line[:110] for line in said]
    assert "no tasks can be taken, trying again until it works" in said[0]
    away.rename(probed.path)
    probed.wait_until_ready()
    probed.client.wait_until_empty("work")
    probed.runs("after")
    assert probed.ledger.count("start long") == 1


def test_a_worker_whose_file_is_replaced_by_a_backup_uses_it(probed: Probed, tmp_path: Path) -> None:
    probed.runs("before")
    backup = tmp_path / "backup.db"
    with closing(sqlite3.connect(probed.path)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    shutil.copy(backup, probed.path.with_name("incoming"))
    probed.path.with_name("incoming").rename(probed.path)
    probed.worker.wait_for("is another file now, and is used from now on")
    probed.wait_until_ready()
    probed.runs("after")
    with closing(sqlite3.connect(probed.path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_worker_whose_file_is_damaged_is_not_ready_until_it_is_mended(probed: Probed, tmp_path: Path) -> None:
    backup = tmp_path / "backup.db"
    with closing(sqlite3.connect(probed.path)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    damaged = probed.path.with_name("damaged")
    damaged.write_bytes(backup.read_bytes()[:4_096] + b"\xa5" * 40_000)
    damaged.rename(probed.path)
    probed.wait_until_ready(ready=False)
    rounds(probed)
    assert probed.worker.output.count("malformed") <= 2
    said = leveret("queues", "--url", probed.client.url, fails=True)
    assert "is damaged or not an SQLite file" in said
    incoming = probed.path.with_name("incoming")
    shutil.copy(backup, incoming)
    incoming.rename(probed.path)
    probed.wait_until_ready()
    probed.runs("after")


def test_a_stopped_worker_ends_though_its_file_is_away(probed: Probed) -> None:
    for file in probed.path.parent.glob("leveret.db*"):
        if file.is_file():
            file.unlink()
    probed.wait_until_ready(ready=False)
    probed.worker.signal(15)
    assert probed.worker.exit_code() == 0
    assert not probed.path.exists()


def test_a_hard_link_is_refused_by_a_worker_and_by_who_looks(probed: Probed) -> None:
    other = probed.path.with_name("other-name.db")
    other.hardlink_to(probed.path)
    said = leveret("queues", "--url", f"sqlite:///{other}", fails=True)
    assert "2 names (hard links)" in said
    with Worker(f"sqlite:///{other}", probed.ledger) as worker:
        assert worker.exit_code() == 1
        assert "2 names (hard links)" in worker.output


def test_bad_rows_are_dead_letters_of_a_worker_that_goes_on(probed: Probed) -> None:
    """Whatever a row holds, the worker and its children live, and each command shows it."""
    rows = [
        "(1, 'bad-1', 'say', 'a text', 1, NULL, NULL)",
        "(1, x'ff00', 'say', x'00', 1, NULL, NULL)",
        "(1, 'bad-3', 'say', x'7b7d', 1, x'c1', NULL)",
        "(1, 'bad-4', 'say', x'7b7d', 9223372036854775807, NULL, NULL)",
        "(1, 'bad-5', x'ff', x'7b7d', 1, NULL, NULL)",
        "(1, 'bad-6', 'say', x'7b7d', 1, NULL, 9e999)",
    ]
    with closing(sqlite3.connect(probed.path, isolation_level=None, timeout=20)) as database:
        database.execute("INSERT INTO queue (name) VALUES (x'626c6f62')")
        (number,) = database.execute("SELECT id FROM queue WHERE name = 'work'").fetchone()
        for row in rows:
            database.execute(
                "INSERT INTO task (queue, id, name, body, attempt, headers, expires_at) VALUES "
                + row.replace("(1,", f"({number},", 1)
            )
    probed.runs("after")
    letters = probed.client.wait_until_dead("work", len(rows))
    assert all(letter.reason.startswith("its row in the file cannot be read") for letter in letters)
    url = probed.client.url
    assert "work" in leveret("queues", "--url", url)
    assert "cannot be read" in leveret("dead", "list", "work", "--url", url)
    for letter in letters:
        leveret("status", letter.envelope.id, "--url", url)
    leveret("dead", "drop", "work", "--all", "--url", url)
    assert probed.client.dead("work") == []
    assert probed.worker.process.poll() is None
    assert probed.worker.output.count("Traceback") == 0
