"""The Django example: a real server, a real worker, on every broker; HTTP between the server and the test."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx

from tests.examples.programs import EXAMPLES, PATIENCE, running
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.conftest import Place

FOLDER = EXAMPLES / "django"
MANAGE = str(FOLDER / "manage.py")
SERVER = ("-m", "uvicorn", "shop.asgi:application", "--app-dir", str(FOLDER), "--port", "0", "--no-use-colors")
ADDRESS = re.compile(r"running on (http://\S+)")
CSRF = re.compile(r'name="csrfmiddlewaretoken" value="([^"]+)"')
USER = {"DJANGO_SUPERUSER_PASSWORD": "of this test", "DJANGO_SUPERUSER_EMAIL": "a@example.com"}


def manage(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, MANAGE, *arguments], cwd=FOLDER, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_an_order_is_confirmed_after_its_commit_and_the_staff_sees_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**USER, "SHOP_FOLDER": str(tmp_path), "DJANGO_SETTINGS_MODULE": "shop.settings"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LEVERET_URL", place.url)
    manage("migrate", "--run-syncdb")
    manage("createsuperuser", "--noinput", "--username", "admin")
    with (
        running(*SERVER, folder=tmp_path, url=place.url) as server,
        running(MANAGE, "leveret", "worker", folder=tmp_path, url=place.url),
    ):
        wait_until(lambda: server.has_ended or ADDRESS.search(server.output) is not None, "the server listens")
        address = ADDRESS.search(server.output)
        assert address is not None, server.output
        with httpx.Client(base_url=address[1], timeout=30.0, follow_redirects=True) as client:
            stored = client.post("/orders", data={"text": "book"})
            assert stored.status_code == 202, stored.text
            assert ended(client, stored.json()["task"]) == {"state": "succeeded", "result": "1 confirmed"}
            assert client.get(f"/tasks/{'0' * 32}").status_code == 404

            form = client.get("/leveret/")
            assert form.url.path == "/admin/login/"
            login = {"username": "admin", "password": "of this test", "next": "/leveret/"}
            token = CSRF.search(form.text)
            assert token is not None
            overview = client.post("/admin/login/", data={**login, "csrfmiddlewaretoken": token[1]})
            assert overview.url.path == "/leveret/"
            assert "default" in overview.text
            assert client.get("/leveret/dashboard.css").headers["content-type"].startswith("text/css")
            assert client.get("/leveret/task", params={"id": stored.json()["task"]}).status_code == 200
            assert client.get("/leveret/events").status_code == 204
            # A form of the dashboard: with its token it is done, without it is refused.
            page = client.get("/leveret/queue", params={"name": "default"}).text
            fields = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', page))
            assert client.post("/leveret/queue", data={"name": "default", "action": "pause"}).status_code == 403
            paused = client.post(
                "/leveret/queue",
                data={**fields, "name": "default", "action": "pause"},
                headers={"Origin": address[1].rstrip("/")},
            )
            assert paused.status_code == 200, paused.text


def test_its_own_tests_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_FOLDER", str(tmp_path))
    manage("test", "shop")


def ended(client: httpx.Client, task: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        answer: dict[str, Any] = client.get(f"/tasks/{task}").json()
        return answer if answer.get("state") in ("succeeded", "dead") else {}

    return wait_until(ask, "the task has ended")
