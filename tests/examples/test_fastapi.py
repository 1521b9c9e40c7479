"""The FastAPI example: a real server, a real worker, on every broker; HTTP between the server and the test."""

from __future__ import annotations

import io
import re
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from tests.examples.programs import EXAMPLES, Program, running, worker
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.conftest import Place

FOLDER = EXAMPLES / "fastapi"
SERVER = ("-m", "uvicorn", "app:web", "--app-dir", str(FOLDER), "--port", "0", "--no-use-colors")
ADDRESS = re.compile(r"running on (http://\S+)")
UNKNOWN = "0" * 32


@contextmanager
def serving(folder: Path, url: str) -> Iterator[tuple[httpx.Client, Program]]:
    """The web application, and a client for it."""
    with running(*SERVER, folder=folder, url=url) as server:
        wait_until(lambda: server.has_ended or ADDRESS.search(server.output) is not None, "the server listens")
        address = ADDRESS.search(server.output)
        assert address is not None, server.output
        with httpx.Client(base_url=address[1], timeout=30.0) as client:
            yield client, server


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(file, format="PNG")
    return file.getvalue()


def post(client: httpx.Client, content: bytes, **fields: Any) -> httpx.Response:
    return client.post("/thumbnails", files={"image": ("cat.png", content)}, data=fields)


def ended(client: httpx.Client, location: str) -> dict[str, Any]:
    """The status, when it is final."""

    def ask() -> dict[str, Any] | None:
        answer = client.get(location)
        assert answer.status_code == 200, answer.text
        status: dict[str, Any] = answer.json()
        return None if "retry-after" in answer.headers else status

    status = wait_until(ask, f"{location} has ended")
    assert status is not None
    return status


def test_an_image_becomes_a_thumbnail(tmp_path: Path, place: Place) -> None:
    with serving(tmp_path, place.url) as (client, _):
        answer = post(client, picture(400, 200), width=100)
        assert answer.status_code == 202
        location = answer.headers["Location"]
        assert answer.json() == {"id": location.rpartition("/")[2], "status": location}
        # The first task of a broker makes the stream that tells of it.
        wait_until(lambda: client.get(location).status_code == 200, "the task is known")
        waiting = client.get(location)
        assert waiting.json() == {"id": answer.json()["id"], "state": "queued"}
        assert waiting.headers["Retry-After"] == "1"
        assert client.get(f"{location}/image").status_code == 409
    # Task and image are stored, and another server process can ask for them.
    with (
        serving(tmp_path, place.url) as (client, server),
        running(*worker(FOLDER / "tasks.py"), folder=tmp_path, url=place.url),
    ):
        path = httpx.URL(location).path
        status = ended(client, path)
        assert status["state"] == "succeeded"
        assert status["progress"] == {"done": 3, "total": 3, "note": "done"}
        image = client.get(status["result"])
        assert image.headers["Content-Type"] == "image/webp"
        with Image.open(io.BytesIO(image.content)) as thumbnail:
            assert thumbnail.size == (100, 50)
        broken = post(client, b"this is no image")
        status = ended(client, broken.headers["Location"])
        assert status["state"] == "dead"
        assert status["error"] == "this is no image that can be read (UnidentifiedImageError)"
        assert client.get(f"{broken.headers['Location']}/image").status_code == 422
        assert "Traceback" not in server.output


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_bad_requests_are_refused(tmp_path: Path, place: Place) -> None:
    with serving(tmp_path, place.url) as (client, server):
        assert client.post("/thumbnails").status_code == 422
        assert post(client, picture(1, 1), width=0).status_code == 422
        assert post(client, b"x" * (10 * 1024 * 1024 + 1)).status_code == 413
        for path in (f"/thumbnails/{UNKNOWN}", f"/thumbnails/{UNKNOWN}/image"):
            assert client.get(path).status_code == 404
        assert client.get("/thumbnails/no-id").status_code == 422
        assert list((tmp_path / "uploads").iterdir()) == []
        assert "Traceback" not in server.output


def test_a_broker_that_cannot_be_used_is_a_503_until_it_can(tmp_path: Path) -> None:
    database = tmp_path / "tasks.db"
    with serving(tmp_path, f"sqlite:///{database}") as (client, server):
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = post(client, picture(1, 1))
        assert answer.status_code == 503
        assert answer.json() == {"detail": "the task queue cannot be used now; try again later"}
        assert "the broker cannot be used: " in server.output
        assert post(client, picture(1, 1)).status_code == 202
        assert "Traceback" not in server.output
