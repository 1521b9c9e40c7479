"""Stopping a worker: in two stages, and nothing is lost or charged. Starting one that cannot work."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import leveret
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.nodes import free_ports
from tests.support.workers import Ledger, Worker, is_alive

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.nodes import Node


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_finishes_what_runs(place: Place, client: Client, ledger: Ledger, number: int) -> None:
    """It takes no more, finishes what it began, hands back what it had not begun, and exits 0."""
    client.enqueue_many(ledger_app.pause, [(name, 1.5) for name in "abcd"])
    with Worker(place.url, ledger, "--concurrency", "1", "--prefetch", "3") as worker:
        child = int(ledger.wait_for("start a").split()[-1])
        worker.signal(number)
        assert worker.exit_code() == 0
        assert "Traceback" not in worker.output
        assert not is_alive(child)
    assert ledger.lines() == [f"start a {child}", "end a"]
    client.wait_until_counts("work", ready=3)
    with Worker(place.url, ledger, "--concurrency", "4"):
        for name in "bcd":
            ledger.wait_for(f"end {name}")
        client.wait_until_empty("work")


def test_what_outlasts_the_grace_is_handed_back(place: Place, client: Client, ledger: Ledger) -> None:
    """Uncharged: the next run is the first attempt still."""
    client.enqueue(ledger_app.pause, "a", 60)
    with Worker(place.url, ledger, "--grace", "0.5") as worker:
        child = int(ledger.wait_for("start a").split()[-1])
        worker.signal(signal.SIGTERM)
        assert worker.exit_code(within=20) == 0
        assert not is_alive(child)
        assert "handed back" in worker.output
        assert "attempt" not in worker.output
    client.wait_until_counts("work", ready=1, running=0, dead=0)


def test_a_second_signal_stops_at_once(place: Place, client: Client, ledger: Ledger) -> None:
    client.enqueue(ledger_app.pause_in_thread, "a", 60)
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("start a")
        worker.signal(signal.SIGINT)
        worker.wait_for("stopping")
        worker.signal(signal.SIGINT)
        assert worker.exit_code(within=20) == 0, "before the 30 s of its grace"
    client.wait_until_counts("work", ready=1, running=0, dead=0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
        ("import os; os._exit(7)", "exited with code 7"),
        ("import leveret; app = 1", "has no application 'app'"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_an_app_that_cannot_be_imported_ends_the_worker(tmp_path: Path, ledger: Ledger, code: str, reason: str) -> None:
    """Non-zero, with the reason, once: no restarting in a loop."""
    module = tmp_path / "broken.py"
    module.write_text(code)
    with Worker(f"sqlite:///{tmp_path / 'x.db'}", ledger, "--processes", "2", app=f"{module}:app") as worker:
        assert worker.exit_code() == 1
        *above, last = worker.output.splitlines()
        assert last.startswith("leveret: ")
        assert reason in last
        # Above it stands the traceback of the application's own code, once, where there is one.
        assert len([line for line in above if line.startswith(("Traceback", "  File"))]) <= 2
        assert str(Path(leveret.__file__).parent) not in worker.output


def test_a_stop_ends_an_import_that_hangs(tmp_path: Path, ledger: Ledger) -> None:
    module = tmp_path / "slow.py"
    module.write_text("from tests.support.ledger_app import note\nnote('importing')\nimport time; time.sleep(60)")
    with Worker(f"sqlite:///{tmp_path / 'x.db'}", ledger, app=f"{module}:app") as worker:
        ledger.wait_for("importing")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code(within=20) == 0


def test_an_app_that_breaks_later_ends_the_worker(tmp_path: Path, ledger: Ledger) -> None:
    """A child that died cannot be replaced: the worker hands everything back and says why it ends."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    module = tmp_path / "fragile.py"
    module.write_text("from tests.support.ledger_app import app")
    client = Client(url)
    client.enqueue(ledger_app.pause, "a", 60)
    with Worker(url, ledger, app=f"{module}:app") as worker:
        child = int(ledger.wait_for("start a").split()[-1])
        module.write_text("1 / 0")
        module.touch()
        signal_and_wait(child)
        assert worker.exit_code() == 1
        assert "fragile.py, line 1" in worker.output.splitlines()[-1]
        assert worker.output.count("ZeroDivisionError") == 2  # in its traceback, and in the reason
        assert str(Path(leveret.__file__).parent) not in worker.output
    client.wait_until_counts("work", ready=1, running=0)


def signal_and_wait(pid: int) -> None:
    import os

    os.kill(pid, signal.SIGKILL)


def test_a_broker_that_is_away_is_waited_for(node: Node, ledger: Ledger) -> None:
    """At the start: one line a try, no password in it; and SIGTERM ends the waiting."""
    node.kill()
    try:
        url = node.url.replace("guest:guest", "guest:s3cret-w0rd")
        with Worker(url, ledger) as worker:
            worker.wait_for("trying again in", 3)
            worker.signal(signal.SIGTERM)
            assert worker.exit_code() == 0
            assert worker.output.count("\n") == worker.output.count("trying again in")
            assert "s3cret-w0rd" not in worker.output
        with Worker(node.url, ledger) as worker:
            worker.wait_for("trying again in")
            node.start()
            node.wait()
            worker.ready()
            Client(node.url).enqueue(ledger_app.say, "at last")
            ledger.wait_for("said at last")
    finally:
        node.restart()


def test_wrong_credentials_are_an_error_at_once(node: Node, ledger: Ledger) -> None:
    with Worker(node.url.replace("guest:guest", "guest:s3cret-w0rd"), ledger) as worker:
        assert worker.exit_code() == 1
        assert "the user name or password is wrong" in worker.output
        assert "s3cret-w0rd" not in worker.output
    with Worker(f"{node.url}nowhere", ledger) as worker:
        assert worker.exit_code() == 1
        assert "nowhere" in worker.output


def test_a_url_of_no_broker_is_an_error(ledger: Ledger) -> None:
    (port,) = free_ports(1)
    with Worker(f"redis://localhost:{port}", ledger) as worker:
        assert worker.exit_code() == 1
        assert "is not a broker's URL" in worker.output
