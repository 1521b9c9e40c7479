"""Fresh children for changed code: SIGHUP and --reload, with real workers."""

from __future__ import annotations

import os
import pty
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import LEDGER_APP, READY, Ledger, Program, Worker, is_alive

if TYPE_CHECKING:
    from tests.conftest import Place

#: Compiled code of a version that is as long and was written in the same second would be taken for the next version's.
FRESH = {"PYTHONDONTWRITEBYTECODE": "1"}
#: `ledger_app`, and a task of its own that tells which version of the module it is.
MODULE = """
import os
from tests.support.ledger_app import app, note

@app.task(queue="work"{options})
async def version(text: str) -> None:
    note(f"{version} {{text}} {{os.getpid()}}")
    {more}
"""


class Code:
    """The module of an application, in several versions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "versions.py"
        self.write("one")

    def write(self, version: str, *, options: str = "", more: str = "") -> None:
        self.replace(MODULE.format(version=version, options=options, more=more))

    def replace(self, text: str, name: str = "versions.py") -> None:
        """In one step: nobody imports half of it."""
        unfinished = self.folder / "unfinished"
        unfinished.write_text(text)
        unfinished.replace(self.folder / name)

    @property
    def app(self) -> str:
        return f"{self.path}:app"


@pytest.fixture
def code(tmp_path: Path) -> Code:
    folder = tmp_path / "code"
    folder.mkdir()
    return Code(folder)


def ask(client: Client, text: str) -> None:
    """Enqueue `version`."""
    client.publish(b'{"args": ["%s"]}' % text.encode(), queue="work", task="version")


def ask_until(client: Client, ledger: Ledger, beginning: str) -> None:
    """Enqueue `version` again and again, until a child answers so."""

    def answered() -> bool:
        ask(client, "again")
        return ledger.count(beginning) > 0

    wait_until(answered, f"a line {beginning!r} in {ledger.lines()}")


def release(ledger: Ledger, *texts: str) -> None:
    for text in texts:
        Path(f"{ledger.path}.{text}").touch()


def test_sighup_replaces_the_children_and_no_task_pays(
    place: Place, client: Client, ledger: Ledger, code: Code
) -> None:
    with Worker(
        place.url, ledger, "--processes", "2", "--concurrency", "2", app=code.app, environment=FRESH
    ).ready() as worker:
        client.enqueue_many(ledger_app.held, [(f"task{number}",) for number in range(4)])
        ledger.wait_for("start ", 4)
        old = {int(line.split()[-1]) for line in ledger.lines()}
        assert len(old) == 2
        code.write("two")
        worker.signal(signal.SIGHUP)
        worker.wait_for("reloaded: 2 child processes are replaced")
        assert all(map(is_alive, old)), "they have tasks"
        # They count until they end: a worker never runs more at once than it was told to.
        release(ledger, "task0")
        for number in range(4):
            ask(client, str(number))
        ledger.wait_for("two ", 4)
        assert ledger.count("one ") == 0
        fresh = {int(line.split()[-1]) for line in ledger.lines() if line.startswith("two ")}
        assert not fresh & old
        release(ledger, *(f"task{number}" for number in range(4)))
        ledger.wait_for("end ", 4)
        wait_until(lambda: not any(map(is_alive, old)), "the old children have left")
        client.wait_until_empty("work")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    assert ledger.count("start ") == 4, "none was started again"


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_what_cannot_be_imported_leaves_the_children_alone(
    place: Place, client: Client, ledger: Ledger, code: Code
) -> None:
    with Worker(place.url, ledger, app=code.app, environment=FRESH).ready() as worker:
        ask(client, "before")
        ledger.wait_for("one before")
        code.replace("def broken(:")
        worker.signal(signal.SIGHUP)
        worker.wait_for("not reloaded, so the child processes that are there go on: ")
        worker.wait_for("SyntaxError")
        ask(client, "broken")
        ledger.wait_for("one broken")
        code.write("three")
        worker.signal(signal.SIGHUP)
        worker.wait_for("reloaded: 1 child processes are replaced")
        ask(client, "mended")
        ledger.wait_for("three mended")
        assert "Traceback" not in worker.output


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_child_that_is_due_stays_while_there_can_be_no_fresh_one(
    place: Place, client: Client, ledger: Ledger, code: Code
) -> None:
    """Recycling needs the import too."""
    with Worker(place.url, ledger, "--max-tasks-per-child", "1", app=code.app, environment=FRESH).ready() as worker:
        code.replace("def broken(:")
        ask(client, "a")
        worker.wait_for("no fresh child process, so those that are there go on")
        ask(client, "b")
        ledger.wait_for("one b")
        code.write("two")
        ask_until(client, ledger, "two")


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_the_worker_knows_the_tasks_as_they_are_now(place: Place, client: Client, ledger: Ledger, code: Code) -> None:
    """A task that became at most once is not started a second time when its child dies."""
    with Worker(place.url, ledger, app=code.app, environment=FRESH).ready() as worker:
        code.write("two", options=", acknowledge='before'", more="os.kill(os.getpid(), 9)")
        worker.signal(signal.SIGHUP)
        worker.wait_for("reloaded: 1 child processes are replaced")
        ask(client, "fatal")
        worker.wait_for(", and does not run again (acknowledge='before')")
        client.enqueue(ledger_app.say, "after")
        ledger.wait_for("said after")
    assert ledger.count("two fatal") == 1


def test_a_change_of_a_source_file_reloads(tmp_path: Path, ledger: Ledger, code: Code) -> None:
    """Of the module, and of what it imports from another folder; a mistake is shown, and the children go on."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    client = Client(url)
    with Worker(url, ledger, "--reload", app=code.app, environment=FRESH).ready() as worker:
        worker.wait_for("watching the Python files in")
        ask(client, "a")
        ledger.wait_for("one a")
        (code.folder / "parts").mkdir()
        (code.folder / "parts" / "words.py").write_text("word = 'two'")
        code.write("two", more="from parts.words import word; note(f'word {word}')")
        code.replace(f"import parts.words\n{code.path.read_text()}")
        worker.wait_for("changed: ")
        ask_until(client, ledger, "word two")
        worker.wait_for(f"{code.folder}, {code.folder / 'parts'}")
        worker.wait_for("watching the Python files in", 2)
        code.replace("def broken(:", "parts/words.py")
        worker.wait_for("not reloaded, so the child processes that are there go on: ")
        worker.wait_for("SyntaxError")
        ask(client, "c")
        ledger.wait_for("two c")
        code.replace("word = 'three'", "parts/words.py")
        ask_until(client, ledger, "word three")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    assert client.dead("work") == []


def test_without_watchfiles_it_says_what_to_install(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "watchfiles.py").write_text("raise ImportError('not here')")
    environment = {"PYTHONPATH": str(tmp_path)}
    with Worker(f"sqlite:///{tmp_path / 'x.db'}", ledger, "--reload", environment=environment) as worker:
        assert worker.exit_code() == 1
        assert worker.output.startswith("leveret: --reload needs watchfiles: pip install 'leveret[reload]'")


def test_a_closed_terminal_stops_the_worker(tmp_path: Path, ledger: Ledger) -> None:
    """Which sends the same signal. A worker that nobody can see any more would be a surprise."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["LEDGER"] = str(ledger.path)
        os.execv(sys.executable, [sys.executable, "-m", "leveret", "worker", LEDGER_APP, "--url", url])
    try:
        said = b""
        while READY.encode() not in said:
            said += os.read(terminal, 1024)
        client = Client(url)
        client.enqueue(ledger_app.held, "a")
        ledger.wait_for("start a")
    finally:
        os.close(terminal)
    release(ledger, "a")
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], "the worker has ended")
    client.wait_until_empty("work")
    assert ledger.count("end a") == 1


def test_a_program_that_ignores_hangups_goes_on(tmp_path: Path, ledger: Ledger) -> None:
    """As under nohup."""
    url = f"sqlite:///{tmp_path / 'x.db'}"
    program = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); from leveret.worker import run_worker; "
        f"run_worker({LEDGER_APP!r}, url={url!r})"
    )
    with Program(["-c", program], tmp_path / "program.log", {"LEDGER": str(ledger.path)}) as worker:
        worker.wait_for(READY)
        worker.signal(signal.SIGHUP)
        Client(url).enqueue(ledger_app.say, "a")
        ledger.wait_for("said a")
        assert "reloaded" not in worker.output
