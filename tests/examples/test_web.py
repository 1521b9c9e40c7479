"""The web example: a real server, a real worker, and HTTP between the server and the test."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.examples.programs import EXAMPLES, Program, running, worker
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = EXAMPLES / "web"
#: What examples/web/tasks.py takes for one render (seconds).
DURATION = 3.0
SERVER = ("-m", "uvicorn", "app:web", "--app-dir", str(FOLDER), "--port", "0", "--no-use-colors")
ADDRESS = re.compile(r"running on (http://\S+)")


@contextmanager
def serving(folder: Path) -> Iterator[tuple[httpx.Client, Program]]:
    """The web application, and a client for it."""
    with running(*SERVER, folder=folder, url=url(folder)) as server:
        wait_until(lambda: server.has_ended or ADDRESS.search(server.output) is not None, "the server listens")
        address = ADDRESS.search(server.output)
        assert address is not None, server.output
        with httpx.Client(base_url=address[1], timeout=30.0) as client:
            yield client, server


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'tasks.db'}"


def rendered(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in folder.glob("renders/*.txt")]


def test_it_answers_at_once_and_a_worker_renders(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, _):
        answer = client.post("/renders", json={"text": "Grüße\nfrom the web"})
        assert answer.status_code == 202
        assert answer.elapsed.total_seconds() < DURATION / 2
        assert re.fullmatch("[0-9a-f]{32}", answer.json()["id"])
    # The task is stored: the server may be gone by the time that a worker comes.
    assert rendered(tmp_path) == []
    with running(*worker(FOLDER / "tasks.py"), folder=tmp_path, url=url(tmp_path)):
        wait_until(lambda: bool(rendered(tmp_path)), "the file is written")
    assert rendered(tmp_path) == ["+--------------+\n| Grüße        |\n| from the web |\n+--------------+\n"]


def test_bad_requests_are_refused_with_a_reason(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, server):
        for content, complaint in [
            (b"", "is not JSON"),
            (b"{", "is not JSON"),
            (b"\xff", "is not JSON"),
            (b"[" * 100_000, "is not JSON"),
            (b"[]", "send a JSON object with a text"),
            (b"{}", "send a JSON object with a text"),
            (b'{"text": ""}', "send a JSON object with a text"),
            (b'{"text": 5}', "send a JSON object with a text"),
            (b'{"text": "\\ud800"}', "lone surrogate"),
            (b'{"text": "%s"}' % (b"x" * 1024 * 1024), "over the limit of"),
        ]:
            answer = client.post("/renders", content=content)
            assert answer.status_code == 400, content[:20]
            assert complaint in answer.json()["error"]
        assert "Traceback" not in server.output


def test_a_broker_that_cannot_be_used_is_a_503_until_it_can(tmp_path: Path) -> None:
    with serving(tmp_path) as (client, server):
        # The write lock on the database, held by another program.
        with closing(sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            answer = client.post("/renders", json={"text": "too busy"})
        assert answer.status_code == 503
        assert answer.json() == {"error": "the task queue cannot be used now; try again later"}
        assert f"cannot enqueue a render: {tmp_path / 'tasks.db'} did not confirm" in server.output
        assert client.post("/renders", json={"text": "free again"}).status_code == 202
        assert "Traceback" not in server.output


@pytest.mark.parametrize("wrong", ["sqlite:////no/such/folder/tasks.db", "nonsense://"])
def test_the_server_does_not_start_without_its_broker(tmp_path: Path, wrong: str) -> None:
    with running(*SERVER, folder=tmp_path, url=wrong) as server:
        assert server.wait() != 0
    assert wrong.removeprefix("sqlite:///") in server.output
