"""Brokers by the scheme of their URL: Leveret's own, and one of another package."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from leveret import App, ConfigurationError
from leveret.brokers import connect, schemes
from leveret.executors import InProcessExecutor
from leveret.worker import Worker

if TYPE_CHECKING:
    from pathlib import Path

_MODULE = """
from leveret.brokers.memory import MemoryBroker

opened = []

class ShelfBroker(MemoryBroker):
    pass

def open_broker(url, *, timeout, keep):
    opened.append((url, timeout, keep))
    return ShelfBroker(keep=keep)
"""


def install(site: Path, package: str, entry: str) -> None:
    """A distribution as an installer leaves it, with one broker."""
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[leveret.brokers]\n{entry}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shelf_broker", raising=False)
    (tmp_path / "shelf_broker.py").write_text(_MODULE)
    return tmp_path


async def test_another_package_adds_a_broker(site: Path) -> None:
    """By its scheme, whatever its case; it is used as any other is."""
    install(site, "leveret-shelf", "shelf = shelf_broker:open_broker")
    app = App("Shelf://user:secret@host/", enqueue_timeout=3)
    done: list[str] = []

    @app.task
    async def note(text: str) -> None:
        done.append(text)
        worker.stop()

    worker = Worker(InProcessExecutor(app), broker=app.client.broker)
    await note.enqueue("a")
    await worker.run()
    await app.close()
    assert type(app.client.broker).__name__ == "ShelfBroker"
    assert done == ["a"]
    assert sys.modules["shelf_broker"].opened[0][:2] == ("Shelf://user:secret@host/", 3.0)
    assert "shelf" in schemes()


def test_the_command_line_takes_its_url(site: Path) -> None:
    install(site, "leveret-shelf", "shelf = shelf_broker:open_broker")
    command = [sys.executable, "-m", "leveret", "queues", "--url", "shelf://host/"]
    result = subprocess.run(
        command, env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr


def test_an_unknown_scheme_names_the_known_ones(site: Path) -> None:
    install(site, "leveret-shelf", "shelf = shelf_broker:open_broker")
    with pytest.raises(ConfigurationError, match="amqp, amqps, memory, shelf, sqlite; did you mean 'shelf'") as caught:
        connect("shelv://user:secret@host/")
    assert "secret" not in str(caught.value)


def test_a_broker_that_cannot_be_imported_says_why(site: Path) -> None:
    install(site, "leveret-shelf", "shelf = shelf_broker_of_old:open_broker")
    with pytest.raises(ConfigurationError, match="of leveret-shelf, cannot be imported: No module named"):
        connect("shelf://host/")


def test_two_packages_for_one_scheme_are_an_error(site: Path) -> None:
    for package in ("leveret-shelf", "other-shelf"):
        install(site, package, "shelf = shelf_broker:open_broker")
    with pytest.raises(ConfigurationError, match="leveret-shelf and other-shelf both register"):
        connect("shelf://host/")


def test_leverets_own_brokers_are_not_replaced(site: Path) -> None:
    install(site, "leveret-shelf", "memory = shelf_broker:open_broker")
    assert type(connect("memory://")).__name__ == "MemoryBroker"
