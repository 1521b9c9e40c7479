"""The command line as a user meets it: what it prints, and one line instead of a traceback when it is misused."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret.brokers import connect
from leveret.model import Envelope
from tests.support import ledger_app
from tests.support.dashboard import bury
from tests.support.workers import LEDGER_APP, Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.client import Client


def test_enqueue_prints_the_id_and_the_task_runs(place: Place, ledger: Ledger) -> None:
    """Each ARG is JSON, else a string; --kwargs is a JSON object; a raw task takes the ARG as it is."""
    printed = leveret("enqueue", LEDGER_APP, "say", "a word", "--url", place.url)
    assert re.fullmatch(r"[0-9a-f]{32}\n", printed)
    leveret("enqueue", LEDGER_APP, "pause", '"quoted"', "0.1", "--url", place.url)
    leveret("enqueue", LEDGER_APP, "say", "--kwargs", '{"text": "by name"}', "--url", place.url)
    leveret("enqueue", LEDGER_APP, "raw", "-5 [raw", "--url", place.url)
    leveret("enqueue", LEDGER_APP, "say", "moved", "-q", "other", "--url", place.url)
    with Worker(place.url, ledger):
        for line in ("said a word", "end quoted", "said by name", "raw b'-5 [raw'", "said moved"):
            ledger.wait_for(line)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker", "nowhere:app"], "there is no module 'nowhere'"),
        (["worker", "tasks"], "not of the form MODULE:APP"),
        (["worker", "no/such/file.py:app"], "there is no file"),
        (["worker", LEDGER_APP, "--prefetch", "0"], "not a number from 1"),
        (["worker", LEDGER_APP, "--loop", "trio"], "'trio' is not one of 'auto', 'asyncio', 'uvloop'"),
        (["worker", LEDGER_APP, "--processes", "0"], "--processes"),
        (["worker", LEDGER_APP, "--url", "ftp://x"], "is not a broker's URL"),
        (["worker", LEDGER_APP, "--url", "sqlite:///no/such/folder/x.db"], "does its folder exist"),
        (["enqueue", LEDGER_APP, "nobody"], "no task is registered as 'nobody'; known: "),
        (["enqueue", LEDGER_APP, "say"], "missing a required argument: 'text'"),
        (["enqueue", LEDGER_APP, "say", "1"], "does not fit str"),
        (["enqueue", LEDGER_APP, "say", "--kwargs", "[1]"], "is not a JSON object"),
        (["enqueue", LEDGER_APP, "say", "x" * 2_000_000], "Argument list too long"),
        (["enqueue", LEDGER_APP, "say", "x", "--priority", "10"], "10 is not in the range 0<=x<=9"),
        (["enqueue", LEDGER_APP, "say", "x", "--id", ""], "must be printable text of 1 to 255 bytes"),
        (["queues", "--url", "amqp://guest:s3cret@127.0.0.1:1/"], "cannot connect to amqp://guest:***@127.0.0.1:1/"),
        (["queues", "--url", "amqp://host:port/"], "cannot be read"),
        (["queues", "--url", "sqlite:///"], "names no file"),
        (["frobnicate"], "No such command"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    if "too long" in message:  # the system refuses it before Leveret sees it
        with pytest.raises(OSError, match=message):
            leveret(*arguments)
        return
    environment = {"LEVERET_URL": f"sqlite:///{tmp_path / 'x.db'}", "LEDGER": str(tmp_path / "ledger")}
    printed = leveret(*arguments, fails=True, environment=environment)
    assert message in printed
    assert "s3cret" not in printed


def test_what_is_too_large_is_refused(tmp_path: Path) -> None:
    app = tmp_path / "small.py"
    app.write_text(
        "import leveret\napp = leveret.App(max_message_size=100)\n@app.task\ndef say(text: str) -> None: ...\n"
    )
    printed = leveret("enqueue", f"{app}:app", "say", "x" * 200, "--url", f"sqlite:///{tmp_path / 'x.db'}", fails=True)
    assert "over the limit of 100" in printed


def test_a_chosen_id_is_enqueued_once(tmp_path: Path) -> None:
    once = ("enqueue", LEDGER_APP, "say", "x", "--id", "invoice-42", "--url", f"sqlite:///{tmp_path / 'x.db'}")
    environment = {"LEDGER": str(tmp_path / "ledger")}
    assert leveret(*once, environment=environment) == "invoice-42\n"
    assert "leveret: task id taken" in leveret(*once, environment=environment, fails=True)


def test_help_has_examples(tmp_path: Path) -> None:
    for command in ([], ["worker"], ["enqueue"], ["queues"], ["dead", "list"], ["demo"]):
        printed = leveret(*command, "--help", environment={"HOME": str(tmp_path)})
        assert "Examples:" in printed
        assert "leveret" in printed


def test_empty_answers_say_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    assert "No queues" in leveret("queues", "--url", url)
    assert leveret("queues", "--url", url, "--json") == "[]\n"
    leveret("enqueue", LEDGER_APP, "say", "a", "-q", "default", "--url", url)
    assert "has no dead letters" in leveret("dead", "list", "default", "--url", url)
    assert f"The queues in {tmp_path}/x.db have no dead letters." in leveret("dead", "list", "--url", url)


def test_queues_are_purged_and_deleted(place: Place, ledger: Ledger, client: Client) -> None:
    """Counted, only with --yes off a terminal, and not under a worker's feet."""
    for text in ("a", "b"):
        client.enqueue(ledger_app.say, text)
    client.wait_until_counts("work", ready=2)
    for act in ("purge", "delete"):
        said = leveret("queues", act, "work", "--url", place.url, fails=True)
        assert "2 ready, 0 limited, 0 running, 0 delayed, 0 dead, 0 consumers" in said
        assert f"say --yes to {act} without being asked" in said
    said = leveret("queues", "purge", "work", "--yes", "--url", place.url)
    assert said == "queue 'work' is purged: 2 ready and 0 delayed tasks are gone\n"
    with Worker(place.url, ledger).ready():
        client.wait_until_counts("work", consumers=1)
        for act in ("purge", "delete"):
            said = leveret("queues", act, "work", "--yes", "--url", place.url, fails=True)
            assert "queue 'work' is in use: 1 consumers, 0 running tasks" in said
        said = leveret("queues", "delete", "work", "--yes", "--force", "--url", place.url)
        assert "is deleted, and its workers keep it: 0 ready, 0 delayed and 0 dead tasks are gone" in said
        client.enqueue(ledger_app.say, "again")
        ledger.wait_for("said again")
    client.wait_until_counts("work", consumers=0, running=0)
    leveret("queues", "delete", "work", "--yes", "--url", place.url)
    assert client.stats("work").ready == 0
    said = leveret("queues", "delete", "work", "--yes", "--url", place.url, fails=True)
    assert "queue 'work' does not exist" in said


def test_a_queue_that_no_worker_takes_is_told(place: Place) -> None:
    say = ("enqueue", LEDGER_APP, "say", "x", "--url", place.url)
    printed, told = (leveret_both(*say, "-q", name) for name in ("wrok", "work"))
    assert "queue 'wrok' is none of the application's" in printed
    assert "did you mean 'work'?" in printed
    assert "none of the application's" not in told


def test_dead_letters_of_a_misspelt_queue_are_an_error(place: Place, client: Client) -> None:
    """Not a comfort: someone looks for lost tasks in the wrong queue, or in the wrong file."""
    client.enqueue(ledger_app.say, "a")
    for command in (["list"], ["list", "--json"], ["retry", "--all"], ["drop", "--all"]):
        said = leveret("dead", *command, "wrok", "--url", place.url, fails=True)
        assert re.match(r"leveret: (queue 'wrok' does not exist|there is no queue and no dead letter 'wrok')", said)
        assert re.search(r" \(looked in [^\n]*\)\n$", said)


def test_the_idle_worker_costs_nothing(tmp_path: Path, ledger: Ledger) -> None:
    """No busy polling: an idle worker wakes up some ten times a second, and computes next to nothing.

    Neither depends on what else the machine does: what it costs in processor time is in the benchmark's footprint.
    """
    with Worker(f"sqlite:///{tmp_path / 'x.db'}", ledger).ready() as worker:
        woken, spent = wake_ups(worker.pid), cpu_seconds(worker.pid)
        time.sleep(3)  # the measurement itself
        assert wake_ups(worker.pid) - woken < 3 * 30
        assert cpu_seconds(worker.pid) - spent < 1.0, "it spins"


def leveret_both(*arguments: str) -> str:
    """What a command prints on both of its outputs."""
    done = subprocess.run(
        [sys.executable, "-m", "leveret", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("shown", [["queues"], ["dead", "show", "1"], ["dead", "list"]])
def test_no_color_is_no_bold_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: list[str]) -> None:
    url = f"sqlite:///{tmp_path}/x.db"

    async def bury_one() -> None:
        broker = connect(url)
        await bury(broker, [Envelope("1", "work", "say", b"{}")], "no")
        await broker.close()

    asyncio.run(bury_one())
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        ours, theirs = os.openpty()
        process = subprocess.run(
            [sys.executable, "-m", "leveret", *shown, "--url", url],
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            env={**os.environ, "TERM": "xterm-256color"},
            timeout=60,
            check=True,
        )
        os.close(theirs)
        printed = os.read(ours, 65_536)
        os.close(ours)
        assert process.returncode == 0
        assert (b"\x1b[" in printed) == (not no_color), printed


def wake_ups(pid: int) -> int:
    """How often its threads have waited for something."""
    statuses = [file.read_text().splitlines() for file in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(line.split()[1]) for lines in statuses for line in lines if line.startswith("voluntary_ctxt"))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


@pytest.mark.parametrize("options", [(), ("-q", "default")])
def test_an_application_without_tasks_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    """It would make a dead letter of each message that comes."""
    empty = tmp_path / "empty.py"
    empty.write_text("from leveret import App, Queue\napp = App(queues=[Queue('default')])\n")
    printed = leveret("worker", f"{empty}:app", "--url", f"sqlite:///{tmp_path / 'q.db'}", *options, fails=True)
    assert "the application has no tasks" in printed
    assert "import the modules that register them" in printed


@pytest.mark.parametrize("own", ["", "@app.task\ndef own() -> None: ...\n"])
@pytest.mark.parametrize("command", [("worker", "shop/circ.py:app"), ("enqueue", "shop/circ.py:app", "far")])
def test_a_file_that_is_imported_under_two_names_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, command: tuple[str, ...]
) -> None:
    shop = tmp_path / "shop"
    shop.mkdir()
    (shop / "circ.py").write_text(f"from leveret import App\napp = App()\n{own}import shop.tasks\n")
    (shop / "tasks.py").write_text("from shop.circ import app\n@app.task\ndef far() -> None: ...\n")
    monkeypatch.chdir(tmp_path)
    environment = {"PYTHONPATH": str(tmp_path), "LEVERET_URL": f"sqlite:///{tmp_path / 'q.db'}"}
    printed = leveret(*command, environment=environment, fails=True)
    assert "was imported twice, as 'circ' and as 'shop.circ'" in printed
    assert "(far): use shop.circ:app" in printed
    assert re.fullmatch(r"[0-9a-f]{32}\n", leveret("enqueue", "shop.circ:app", "far", environment=environment))


def test_a_worker_says_what_it_runs_and_why_a_task_is_foreign(place: Place, ledger: Ledger, client: Client) -> None:
    with Worker(place.url, ledger, "-q", "work") as worker:
        worker.ready()
        worker.wait_for("a message of its queues for any other task becomes a dead letter")
        client.publish(b'{"args": []}', queue="work", task="theirs")
        worker.wait_for("if another application uses this queue, give each one queues of its own")
    assert "give each one queues of its own" in leveret("dead", "list", "work", "--url", place.url, "--json")
