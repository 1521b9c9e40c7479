"""Which SQLite file is meant: one, wherever a program goes, and none is made by a look."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret import App, ConfigurationError, QueueNotFound
from leveret.brokers import absolute, connect
from leveret.model import Envelope, Queue
from tests.support.waiting import wait_until
from tests.support.workers import Program

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

APP = """
import os
from leveret import App
{before}
app = App({url})
{after}

@app.task
def start() -> None:
    os.chdir("/")
    follow.enqueue_sync()

@app.task
def follow() -> None:
    open(os.environ["MARK"], "w").close()
"""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LEVERET_URL")}
    return {**inherited, "MARK": str(tmp_path / "mark"), "COLUMNS": "80", **more}


def leveret(
    folder: Path, *arguments: str, fails: bool = False, more: Mapping[str, str] | None = None
) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "leveret", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env=environment(folder, **(more or {})),
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("url", "options", "more", "file"),
    [
        ("", [], {}, "leveret.db"),
        ("'sqlite:///own.db'", [], {}, "own.db"),
        ("", [], {"LEVERET_URL": "sqlite:///of%20env.db"}, "of env.db"),
        ("", ["--url", "sqlite:///given.db"], {}, "given.db"),
    ],
    ids=["default", "own", "environment", "option"],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("", "os.chdir('/')")], ids=["stays", "goes"])
def test_what_a_task_enqueues_elsewhere_is_run(
    tmp_path: Path, url: str, options: Sequence[str], more: dict[str, str], file: str, before: str, after: str
) -> None:
    (tmp_path / "tasks.py").write_text(APP.format(url=url, before=before, after=after))
    leveret(tmp_path, "enqueue", "tasks:app", "start", *options, more=more)
    arguments = ["-m", "leveret", "worker", "tasks:app", *options]
    with Program(arguments, tmp_path / "log", environment(tmp_path, **more), folder=tmp_path) as worker:
        wait_until((tmp_path / "mark").exists, f"the task ran: {worker.output}")
        assert f" in {tmp_path / file}\n" in worker.output
    assert [one.name for one in tmp_path.glob("*.db")] == [file]
    assert not Path("/leveret.db").exists()


def test_where_the_application_is_made_is_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.delenv("LEVERET_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    app = App()
    monkeypatch.chdir(tmp_path / "there")
    assert app.url == f"sqlite:///{tmp_path}/leveret.db"
    monkeypatch.setenv("LEVERET_URL", "sqlite:///other.db")
    assert app.url == f"sqlite:///{tmp_path}/other.db"
    assert App().url == f"sqlite:///{tmp_path}/there/other.db"


@pytest.mark.parametrize("name", ["a b", "a%b", "a#b?c", "täst", os.fsdecode(b"\xff\xfe")], ids=range(5))
def test_any_folder_has_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    url = absolute("sqlite:///leveret.db")
    monkeypatch.chdir(tmp_path)

    async def declare() -> None:
        broker = connect(url)
        await broker.declare([Queue("work")])
        await broker.close()

    asyncio.run(declare())
    assert (folder / "leveret.db").exists()


def test_a_home_is_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("sqlite:///~/tasks.db") == f"sqlite:///{tmp_path}/tasks.db"
    assert absolute("sqlite:///./~x.db", Path("/srv")) == "sqlite:////srv/~x.db"
    with pytest.raises(ConfigurationError, match="cannot be told to what"):
        absolute("sqlite:///~nobody-of-that-name/tasks.db")


@pytest.mark.parametrize("url", ["memory://", "sqlite:////srv/x.db", "amqp://guest:guest@host/x.db", "sqlite:///"])
def test_other_urls_stay_as_they_are(url: str) -> None:
    assert absolute(url, Path("/var")) == url


def test_memory_is_no_file() -> None:
    with pytest.raises(ConfigurationError, match="memory://"):
        connect("sqlite:///:memory:")


def test_a_directory_that_is_gone_matters_to_whoever_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.delenv("LEVERET_URL", raising=False)
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert App("amqp://there/").url == "amqp://there/"
    with pytest.raises(ConfigurationError, match="relative path"):
        _ = App().url
    monkeypatch.chdir("/")


LOOKS = (
    (["queues"], False),
    (["queues", "--json"], False),
    (["queues", "-q", "mail"], False),
    (["queues", "pause", "mail"], True),
    (["queues", "delete", "mail", "--yes"], True),
    (["dead", "list"], False),
    (["dead", "list", "mail"], True),
    (["dead", "retry", "--all"], False),
    (["status", "1"], True),
    (["result", "1"], True),
    (["cancel", "1"], True),
    (["top", "--once"], False),
)


@pytest.mark.parametrize(("arguments", "fails"), LOOKS, ids=["-".join(words) for words, _ in LOOKS])
def test_a_look_makes_no_file_and_names_what_it_means(tmp_path: Path, arguments: list[str], fails: bool) -> None:
    said = "".join(leveret(tmp_path, *arguments, fails=fails))
    if "--json" in arguments:
        assert json.loads(said) == []
    elif arguments[0] not in ("top", "cancel"):
        assert str(tmp_path / "leveret.db") in said
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_a_mistake_of_a_look_too(tmp_path: Path) -> None:
    _, said = leveret(tmp_path, "queues", "--url", "sqlite:///absent/x.db", fails=True)
    assert "does its folder exist" in said


async def test_every_look_of_a_broker_makes_no_file(tmp_path: Path) -> None:
    broker = connect(f"sqlite:///{tmp_path}/x.db")
    assert list(await broker.queues.stats(["work"])) == []
    assert [
        *await broker.statuses.read(["1"]),
        *await broker.statuses.recent(10),
        *await broker.control.workers(),
    ] == []
    assert list(await broker.dead_letters.read("work", limit=1)) == []
    assert (await broker.queues.ready(["work"]), await broker.control.cancel("1")) == (0, None)
    for change in (broker.queues.pause, broker.queues.resume, broker.queues.purge, broker.queues.delete):
        with pytest.raises(QueueNotFound, match=r"there is no file .*x\.db"):
            await change("work")
    async with broker.statuses.follow(["1"]), broker.statuses.watch():
        await asyncio.sleep(0.5)  # nothing happens
    await broker.close()
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_who_follows_before_there_is_a_file_is_told_what_comes(tmp_path: Path) -> None:
    broker, other = (connect(f"sqlite:///{tmp_path}/x.db") for _ in range(2))
    async with broker.statuses.watch() as watch, broker.statuses.follow(["1"]) as feed, asyncio.timeout(20):
        await other.declare([Queue("work")])
        await other.publish([Envelope("1", "work", "say", b"{}")])
        async for batch in feed:
            if [status.id for status in batch] == ["1"]:
                break
        await other.control.cancel("1")
        async for batch in watch:
            if [(status.id, status.state) for status in batch] == [("1", "cancelled")]:
                break
    await broker.close()
    await other.close()


def test_a_new_file_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(APP.format(url="", before="", after=""))
    printed, said = leveret(tmp_path, "enqueue", "tasks:app", "follow")
    assert said == f"leveret: made the file {tmp_path}/leveret.db; a worker of another file does not see it\n"
    assert len(printed.split()) == 1
    assert leveret(tmp_path, "enqueue", "tasks:app", "follow")[1] == ""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = ["-m", "leveret", "worker", "tasks:app"]
    started = environment(tmp_path, PYTHONPATH=str(tmp_path))
    with Program(arguments, tmp_path / "log", started, folder=elsewhere) as worker:
        worker.wait_for("waiting for tasks on")
        assert f"made the file {elsewhere}/leveret.db" in worker.output
        assert f"in {elsewhere}/leveret.db" in worker.output
