"""``leveret tasks``: what it shows, on a file."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from leveret import QueueNotFound
from leveret.brokers import connect
from leveret.cli import cli
from leveret.model import Envelope, Queue

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "\x1b]0;owned\x07"
NOW = 1_900_000_000.0


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with three ready and two delayed tasks in one queue, and an empty queue."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    url = f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("LEVERET_URL", url)

    async def fill() -> None:
        broker = connect(url)
        await broker.declare([Queue("mail"), Queue("empty")])
        body = b'{"args":["' + b"x" * 100 + b'"]}'
        await broker.publish([Envelope("first", "mail", "send", body, enqueued_at=1_700_000_000.0)])
        await broker.publish([Envelope("urgent", "mail", "send", b"\xff", priority=9)])
        await broker.publish([Envelope("evil", "mail", None, f"{EVIL}\n".encode(), attempt=3)])
        await broker.publish([Envelope("later", "mail", "send", b"{}", due=NOW + 5, expires_at=NOW + 60)])
        await broker.publish([Envelope("soon", "mail", "send", b"{}", due=NOW)])
        await broker.close()

    asyncio.run(fill())
    return url


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("url")
def test_what_is_ready_is_listed_as_it_will_be_taken() -> None:
    header, *lines = run("tasks", "list", "mail").splitlines()
    assert header.split() == ["id", "task", "enqueued", "due", "priority", "attempt", "arguments"]
    assert [line.split()[0] for line in lines] == ["urgent", "first", "evil"]
    assert lines[0].split() == ["urgent", "send", "-", "-", "9", "1", "\\xff"]
    assert lines[1].split()[1:6] == ["send", "2023-11-14", "22:13:20", "-", "-"]
    assert lines[1].endswith("x…")
    assert "\x1b" not in lines[2]
    assert lines[2].split()[1:6] == ["-", "-", "-", "-", "3"]
    assert len(run("tasks", "list", "mail", "--limit", "1").splitlines()) == 2


@pytest.mark.usefixtures("url")
def test_what_is_delayed_is_listed_by_when_it_is_due() -> None:
    _, *lines = run("tasks", "list", "mail", "--state", "delayed").splitlines()
    assert [line.split()[0] for line in lines] == ["soon", "later"]
    assert "2030-03-17 17:46:40" in lines[0]


@pytest.mark.usefixtures("url")
def test_for_programs_it_is_whole() -> None:
    found = json.loads(run("tasks", "list", "mail", "--json"))
    assert [one["id"] for one in found] == ["urgent", "first", "evil"]
    assert found[1]["body"] == '{"args":["' + "x" * 100 + '"]}'
    assert (found[0]["priority"], found[0]["body"], found[2]["body"]) == (9, "\\xff", f"{EVIL}\n")
    (soon, later) = json.loads(run("tasks", "list", "mail", "--state", "delayed", "--json"))
    assert (soon["due"], soon["expires_at"]) == ("2030-03-17T17:46:40.000+00:00", None)
    assert later["expires_at"] == "2030-03-17T17:47:40.000+00:00"
    assert json.loads(run("tasks", "list", "empty", "--json")) == []


@pytest.mark.usefixtures("url")
def test_where_nothing_waits_it_says_so() -> None:
    assert run("tasks", "list", "empty", "--state", "delayed") == "Nothing is delayed in queue 'empty'.\n"
    with pytest.raises(QueueNotFound, match=r"queue 'mial' does not exist.*x.db"):
        run("tasks", "list", "mial")
    assert CliRunner().invoke(cli, ["tasks", "list"]).exit_code == 2
    assert CliRunner().invoke(cli, ["tasks", "list", "mail", "--state", "dead"]).exit_code == 2


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(QueueNotFound, match="there is no file"):
        run("tasks", "list", "mail", "--url", f"sqlite:///{tmp_path}/none.db")
    assert list(tmp_path.iterdir()) == []
