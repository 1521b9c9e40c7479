"""The dashboard's pages and forms, on a broker in memory and on a file, without a browser."""

from __future__ import annotations

import asyncio
import re
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from leveret import App, ConfigurationError, PeekRefused, Progress, every
from leveret.brokers.memory import MemoryBroker, MemoryQueues, MemoryStatuses, MemoryStore
from leveret.dashboard import by_name, dashboard, text
from leveret.dashboard.observer import Observer
from leveret.model import Envelope, Queue, Succeeded, new_id
from leveret.model.reports import ChildReport, RunningTask, WorkerReport
from leveret.model.status import Status
from tests.support.dashboard import ADDRESS, Page, Visitor, bury, take, visiting
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from pathlib import Path

    from leveret.model import QueueStats

TOKEN = "a token that is long"
HOSTILE = [
    '<script>alert(1)</script><img src=x onerror="alert(2)">',
    '"\' onmouseover=alert(3) style=color:red x="',
    "{{ 1237*7919 }}{% raw %}</textarea></title></pre><!--",
    "evil\u202etxt.exe\u2066\u200f\x00\x1b[2J\x07",
    "שלום עולם",
    "%3Cb%3E%41&amp;lt;",
]


@pytest.fixture(params=["memory", "sqlite"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[App]:
    application = App("memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'leveret.db'}")

    @application.task(queue="work")
    async def resize(path: str, width: int) -> str:
        return f"{path} {width}"

    with ExitStack() as stack:
        if request.param == "memory":
            stack.enter_context(application.client.enqueuing_to(MemoryBroker()))
        yield application


def dead(number: int = 1, task: str = "resize", **more: Any) -> Envelope:
    return Envelope(
        f"{number:032x}", "work", task, b'{"args": ["cat.png", 80], "kwargs": {}}', enqueued_at=time.time(), **more
    )


async def test_the_overview_shows_the_queues(app: App) -> None:
    async with visiting(app) as visitor:
        await app.tasks[0].enqueue("cat.png", 80)
        await bury(app.client.broker, [dead()], "ValueError: no such file")
        page = Page(await until(lambda: _source_with(visitor, "./", "no such file"), "the failure is on the overview"))
        assert "work" in page.text
        assert any(one.get("href") == "queue?name=work" for one in page.all("a"))
        assert len(page.all("svg")) == 3
        assert all(one["aria-label"] for one in page.all("svg"))


async def test_a_phone_too_shows_how_many_are_delayed(app: App) -> None:
    """What has the class ``wide`` is not shown there."""
    async with visiting(app) as visitor:
        await app.client.broker.declare([Queue("work")])
        page = await until(lambda: _source_with(visitor, "/", "queue?name=work"), "the queue is known")
        hidden = re.findall(r'<th scope="col" class="number wide">(?:<a[^>]*>)?(\w+)', page)
        assert "Limited" in hidden
        assert "Delayed" not in hidden


async def _source_with(visitor: Visitor, path: str, words: str) -> str:
    """The page, when those words are in it; else nothing."""
    page = await visitor.get(path)
    return page if words in page else ""


async def test_a_failure_is_shown_though_much_has_succeeded_since(app: App) -> None:
    async with visiting(app) as visitor:
        await bury(app.client.broker, [dead()], "ValueError: no such file")
        await until(lambda: _source_with(visitor, "/", "no such file"), "the failure is known")
        now = time.time()
        others = [Status(str(number), "succeeded", now, "work", "other") for number in range(1_500)]
        await app.client.broker.statuses.notify(others)
        await until(lambda: _source_with(visitor, "/", ">1499</bdi>"), "the others are known")
        assert "no such file" in await visitor.get("/")
        assert "no such file" not in await visitor.get("/tasks")
        await app.client.broker.dead_letters.retry("work", [dead().id])
        await until(lambda: _source_without(visitor, "/", "no such file"), "it waits again, and is no failure")


async def _source_without(visitor: Visitor, path: str, words: str) -> str:
    page = await visitor.get(path)
    return "" if words in page else page


async def test_a_queue_is_paused_and_resumed(app: App) -> None:
    async with visiting(app) as visitor:
        await app.client.broker.declare([Queue("work")])
        answer = await visitor.post("/queue?name=work", [("queue", "work"), ("action", "pause")])
        assert answer.status_code == 200
        assert "The queue is paused" in answer.text
        assert [one.paused for one in await app.client.broker.queues.stats()] == [True]
        answer = await visitor.post("/queue?name=work", [("queue", "work"), ("action", "resume")])
        assert "The queue goes on" in answer.text
        assert [one.paused for one in await app.client.broker.queues.stats()] == [False]


async def test_a_queue_is_purged_after_a_question(app: App) -> None:
    async with visiting(app) as visitor:
        await app.tasks[0].enqueue("cat.png", 80)
        await app.tasks[0].options(delay=500).enqueue("dog.png", 80)
        await until(lambda: _source_with(visitor, "/queue?name=work", 'id="purge"'), "the queue is known")
        answer = await visitor.post("/queue?name=work", [("queue", "work"), ("action", "purge")])
        assert "Purge queue" in answer.text
        (stats,) = await app.client.broker.queues.stats()
        assert (stats.ready, stats.delayed) == (1, 1), "nothing is done yet"
        fields = [(one["name"] or "", one["value"] or "") for one in Page(answer.text).all("input")]
        sent = [(name, value) for name, value in fields if name != "form"]
        assert ("force", "yes") not in sent, "nobody consumes it"
        answer = await visitor.post("/queue?name=work", [*sent, ("action", "purge")])
        assert "All that waited in the queue is deleted." in answer.text
        (stats,) = await app.client.broker.queues.stats()
        assert (stats.ready, stats.delayed) == (0, 0)


async def test_a_queue_in_use_is_purged_when_the_question_said_so(app: App) -> None:
    async with visiting(app) as visitor, app.client.broker.consume([Queue("work")], credit=1):
        await until(lambda: _source_with(visitor, "/queue?name=work", "<dt>Consumers</dt><dd>1<"), "it is consumed")
        answer = await visitor.post("/queue?name=work", [("queue", "work"), ("action", "purge"), ("sure", "yes")])
        assert answer.status_code == 503
        answer = await visitor.post("/queue?name=work", [("queue", "work"), ("action", "purge")])
        assert "Workers consume it" in answer.text
        sent = [(one["name"] or "", one["value"] or "") for one in Page(answer.text).all("input")][1:]
        assert ("force", "yes") in sent
        answer = await visitor.post("/queue?name=work", [*sent, ("action", "purge")])
        assert "All that waited in the queue is deleted." in answer.text


async def test_a_queue_that_is_not_there(app: App) -> None:
    async with visiting(app) as visitor:
        answer = await visitor.client.get("/queue?name=nothing")
        assert answer.status_code == 404
        assert "No queue" in answer.text
        answer = await visitor.post("/queue", [("queue", "nothing"), ("action", "purge")])
        assert answer.status_code == 404
        answer = await visitor.post("/queue", [("queue", "nothing"), ("action", "pause")])
        assert answer.status_code == 503
        assert "nothing" in answer.text


async def test_a_task_that_failed(app: App) -> None:
    async with visiting(app) as visitor:
        await bury(app.client.broker, [dead()], "ValueError: no such file", "Traceback ...\n  File tasks.py, line 3")
        page = await visitor.get(f"/task?id={dead().id}")
        for shown in ("resize", "ValueError: no such file", "File tasks.py, line 3", "cat.png", "width", "80"):
            assert shown in page
        assert 'id="retry"' in page
        assert 'id="cancel"' not in page


async def test_a_task_that_runs_and_ends(app: App) -> None:
    async with visiting(app) as visitor:
        now = time.time()
        running = Status(
            *("one", "running", now, "work", "resize", 2),
            enqueued_at=now - 5,
            started_at=now - 3,
            progress=Progress(30, 120, "row 30"),
            body=b'{"args": ["photo.jpg"], "kwargs": {"width": 80}}',
        )
        await app.client.broker.declare([Queue("work")])
        await app.client.broker.statuses.notify([running])
        page = await visitor.get("/task?id=one")
        assert '<progress max="100" value="25"' in page
        assert "row 30" in page
        assert "Running for" in page
        assert "photo.jpg" in page
        await app.client.broker.statuses.notify(
            [Status("one", "succeeded", now + 1, "work", "resize", 2, encoded_result=msgspec.Raw(b'{"w": 80}'))]
        )
        page = await until(lambda: _source_with(visitor, "/task?id=one", "succeeded</span>"), "it is shown")
        assert "&#34;w&#34;: 80" in page
        assert "photo.jpg" in page, "what it was called with stays when it has ended"
        assert '<progress max="100" value="25"' in page


async def test_equal_tasks_that_run_are_told_apart(app: App) -> None:
    ids = [f"{number:032x}" for number in range(3)]
    running = [RunningTask(one, "resize", "work", 1, time.time()) for one in ids]
    report = WorkerReport("here:1", time.time(), ["work"], [ChildReport(7, running, 0, 0)], 0, 0, 0)
    async with visiting(app) as visitor, app.client.broker.consume([Queue("work")], credit=1, describe=lambda: report):
        page = await until(lambda: _source_with(visitor, "/workers", "here:1"), "the worker is known")
        assert [f'href="task?id={one}"' in page and f">{one}</bdi>" in page for one in ids] == [True] * 3


async def test_a_task_that_nobody_knows(app: App) -> None:
    async with visiting(app) as visitor:
        answer = await visitor.client.get("/task", params={"id": "<b>nothing</b>"})
        assert answer.status_code == 404
        assert "&lt;b&gt;nothing" in answer.text


async def test_a_waiting_task_is_cancelled(app: App) -> None:
    async with visiting(app) as visitor:
        handle = await app.tasks[0].enqueue("cat.png", 80)
        answer = await visitor.post(f"/task?id={handle.id}", [("id", handle.id), ("action", "cancel")])
        assert "The task is cancelled." in answer.text
        assert (await handle.status()).state == "cancelled"


async def test_a_task_is_run_again_as_a_new_one(app: App) -> None:
    async with visiting(app) as visitor:
        await take(app.client.broker, [dead()], lambda _: Succeeded(b'"done"'))
        assert 'id="again"' in await visitor.get(f"/task?id={dead().id}")
        answer = await visitor.post(f"/task?id={dead().id}", [("id", dead().id), ("action", "again")])
        assert "The task is enqueued again, as a new one." in answer.text
        assert dead().id not in str(answer.url)
        (new,) = await app.client.broker.queues.peek("work", "ready", limit=9)
        assert (new.task, msgspec.json.decode(new.body)) == ("resize", {"args": ["cat.png", 80], "kwargs": {}})
        assert new.id in str(answer.url)
        answer = await visitor.post(f"/task?id={new.id}", [("id", new.id)])
        assert answer.status_code == 400


@pytest.mark.parametrize(
    ("task", "body", "says"),
    [
        ("resize", None, "not known any more"),
        ("resize", b'{"args": ["cat.png", "wide"], "kwargs": {}}', "width"),
        ("other", b"{}", "other"),
    ],
)
async def test_a_task_that_cannot_be_run_again(app: App, task: str, body: bytes | None, says: str) -> None:
    async with visiting(app) as visitor:
        await app.client.broker.declare([Queue("work")])
        await app.client.broker.statuses.notify([Status("one", "succeeded", time.time(), "work", task, body=body)])
        is_offered = 'id="again"' in await visitor.get("/task?id=one")
        assert is_offered == (task == "resize" and body is not None)
        answer = await visitor.post("/task?id=one", [("id", "one"), ("action", "again")])
        assert answer.status_code == 409
        assert says in answer.text
        assert [one.ready for one in await app.client.broker.queues.stats()] == [0]


async def test_a_cancelled_task_is_no_error(app: App) -> None:
    async with visiting(app) as visitor:
        cancelled = Status("one", "cancelled", time.time(), "work", "resize", error="cancelled by hand")
        await app.client.broker.declare([Queue("work")])
        await app.client.broker.statuses.notify([cancelled])
        assert '<section class="card ended"' in await visitor.get("/task?id=one")
        page = await until(lambda: _source_with(visitor, "/tasks", "cancelled by hand"), "it is listed")
        assert '<bdi class="error neutral">cancelled by hand' in page


async def test_dead_letters_are_searched(app: App) -> None:
    letters = [dead(1), dead(2, "mail"), dead(3, "mail")]
    async with visiting(app) as visitor:
        await bury(app.client.broker, letters[:2], "TimeoutError: too slow")
        await bury(app.client.broker, letters[2:], "ValueError: bad address")
        assert await _ids(visitor, "/dead") == {one.id for one in letters}
        assert await _ids(visitor, "/dead?queue=work&task=MAIL") == {letters[1].id, letters[2].id}
        assert await _ids(visitor, "/dead?queue=work&error=timeout") == {letters[0].id, letters[1].id}
        assert await _ids(visitor, "/dead?queue=work&task=mail&error=timeout") == {letters[1].id}
        assert await _ids(visitor, "/dead?queue=work&error=other") == set()


async def _ids(visitor: Visitor, path: str) -> set[str | None]:
    page = Page(await visitor.get(path))
    return {one.get("value") for one in page.all("input") if one.get("name") == "id"}


async def test_dead_letters_are_put_back(app: App) -> None:
    letters = [dead(number) for number in range(1, 6)]
    async with visiting(app) as visitor:
        await bury(app.client.broker, letters, "ValueError")
        chosen = [("id", letters[0].id), ("id", letters[3].id)]
        answer = await visitor.post("/dead", [("queue", "work"), ("action", "retry"), *chosen])
        assert "2 dead letters put back" in answer.text
        assert await _ids(visitor, "/dead?queue=work") == {letters[number].id for number in (1, 2, 4)}
        answer = await visitor.post("/dead", [("queue", "work"), ("action", "retry"), ("all", "yes")])
        assert "3 dead letters put back" in answer.text
        assert [(one.ready, one.dead) for one in await app.client.broker.queues.stats()] == [(5, 0)]


async def test_readers_at_the_same_time_see_all_dead_letters(app: App) -> None:
    letters = [dead(number) for number in range(1, 6)]
    async with visiting(app) as visitor:
        await bury(app.client.broker, letters, "ValueError")
        seen = await asyncio.gather(*(_ids(visitor, "/dead?queue=work") for _ in range(5)))
        assert seen == [{one.id for one in letters}] * 5


async def test_all_that_match_are_dropped_after_a_question(app: App) -> None:
    async with visiting(app) as visitor:
        await bury(app.client.broker, [dead(1), dead(2)], "TimeoutError")
        await bury(app.client.broker, [dead(3)], "ValueError")
        fields = [("queue", "work"), ("action", "drop"), ("error", "timeout"), ("all", "yes")]
        answer = await visitor.post("/dead", fields)
        assert "Drop 2 dead letters for good?" in answer.text
        assert (await app.client.broker.queues.stats())[0].dead == 3
        ids = {one.get("value") or "" for one in Page(answer.text).all("input") if one.get("name") == "id"}
        assert ids == {dead(1).id, dead(2).id}
        fields = [("queue", "work"), ("action", "drop"), ("sure", "yes"), *(("id", one) for one in sorted(ids))]
        answer = await visitor.post("/dead", fields)
        assert "2 dead letters deleted for good" in answer.text
        assert [one.envelope.id for one in await app.client.broker.dead_letters.read("work", limit=9)] == [dead(3).id]


@pytest.mark.parametrize("evil", HOSTILE)
async def test_whatever_is_shown_is_escaped(app: App, evil: str) -> None:
    task, id_ = evil[:200], f"{evil}{new_id()}"
    body = msgspec.json.encode({"args": [evil, {evil: [evil]}], "kwargs": {evil: evil}})
    envelope = Envelope(id_, "work", task, body, enqueued_at=time.time())
    huge = evil * 20_000
    good = Envelope(f"{evil}2", "work", task, body)
    async with visiting(app) as visitor:
        await bury(app.client.broker, [envelope], evil, huge)
        await take(app.client.broker, [good], lambda _: Succeeded(msgspec.json.encode([evil, {evil: huge[:50_000]}])))
        await app.client.broker.statuses.notify(
            [Status(f"{evil}3", "running", time.time(), "work", task, worker=evil, progress=Progress(1, 2, evil))]
        )
        await until(lambda: _source_with(visitor, "/tasks", "running</span>"), "the tasks are known")
        for path in (
            *("/", "/tasks", "/workers", "/dead?queue=work", "/queue?name=work"),
            *(f"/task?id={text.packed(one)}" for one in (id_, f"{evil}2", f"{evil}3")),
            f"/tasks?task={text.packed(evil)}",
            f"/dead?queue=work&error={text.packed(evil)}&task={text.packed(evil)}",
        ):
            _check_harmless(await visitor.get(path), path)
        for path in (f"/task?id={text.packed(evil)}", f"/queue?name={text.packed(evil)}"):
            answer = await visitor.client.get(path)
            assert answer.status_code == 404
            _check_harmless(answer.text, path)
        # The forms carry the id unchanged.
        answer = await visitor.post("/dead", [("queue", "work"), ("action", "retry"), ("id", text.packed(id_))])
        assert "1 dead letter put back" in answer.text


def _check_harmless(source: str, path: str) -> None:
    page = Page(source)
    assert [one.get("src") for one in page.all("script")] == ["dashboard.js"], path
    assert {one.get("src") for one in page.all("img")} <= {"leveret.svg"}, path
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (path, tag, attributes)
        for name in ("href", "action", "src"):
            assert re.match(r"[\w./]*([?#]|$)", attributes.get(name) or ""), (path, tag, attributes)
    assert "9795803" not in page.text, path
    # A value that is sent back may hold what is not shown.
    shown = re.sub(r'(?<= value=")[^"]*', "", source)
    assert re.findall("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200e\u200f]", shown) == [], path
    assert len(source) < 300_000, path


async def test_arguments_and_results_are_redacted(app: App) -> None:
    async with visiting(app, redact=by_name(["path", "return"])) as visitor:
        await bury(app.client.broker, [dead(1)], "ValueError")
        await take(app.client.broker, [dead(2)], lambda _: Succeeded(b'"secret"'))
        page = await visitor.get(f"/task?id={dead(1).id}")
        assert "cat.png" not in page
        assert "(hidden)" in page
        assert "80" in page
        assert "secret" not in await visitor.get(f"/task?id={dead(2).id}")


@pytest.mark.parametrize(
    ("headers", "fields"),
    [
        ({"Origin": "http://evil.test"}, []),
        ({"Origin": "null"}, []),
        ({"Origin": f"{ADDRESS}.evil.test"}, []),
        ({}, [("form", "guessed")]),
        ({}, [("form", "")]),
    ],
)
async def test_a_change_from_elsewhere_is_refused(
    app: App, headers: dict[str, str], fields: list[tuple[str, str]]
) -> None:
    async with visiting(app) as visitor:
        await bury(app.client.broker, [dead()], "ValueError")
        for path, change in (
            ("/dead", [("queue", "work"), ("action", "retry"), ("all", "yes")]),
            ("/queue", [("queue", "work"), ("action", "pause")]),
            ("/queue", [("queue", "work"), ("action", "purge"), ("sure", "yes"), ("force", "yes")]),
            ("/task", [("id", dead().id), ("action", "cancel")]),
            ("/task", [("id", "done"), ("action", "again")]),
        ):
            answer = await visitor.post(path, [*change, *fields], **headers)
            assert answer.status_code == 403
            assert "Nothing was done" in answer.text
        (stats,) = await app.client.broker.queues.stats()
        assert (stats.dead, stats.ready, stats.paused) == (1, 0, False)


async def test_a_change_needs_an_origin_and_a_cookie(app: App) -> None:
    async with visiting(app) as visitor:
        await visitor.get("/")
        content = {"form": visitor.client.cookies["leveret_form"], "queue": "work", "action": "pause"}
        assert (await visitor.client.post("/queue", data=content)).status_code == 403
        visitor.client.cookies.clear()
        answer = await visitor.client.post("/queue", data=content, headers={"Origin": ADDRESS})
        assert answer.status_code == 403
        assert (await visitor.client.get("/queue?queue=work&action=pause")).status_code == 404


async def test_no_page_may_be_kept_framed_or_filled_with_scripts(app: App) -> None:
    async with visiting(app) as visitor:
        for path in ("/", "/dead", "/nothing", "/dashboard.js", "/login"):
            headers = (await visitor.client.get(path)).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert headers["cache-control"] == "no-store"
            assert headers["x-content-type-options"] == "nosniff"
        cookie = (await visitor.client.get("/", headers={"Cookie": ""})).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie


async def test_a_token_locks_everything(app: App) -> None:
    async with visiting(app, token=TOKEN) as visitor:
        for path in ("/", "/dead", "/task?id=1", "/workers", "/tasks", "/queue?name=work"):
            answer = await visitor.client.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, "login")
        assert (await visitor.client.get("/events")).status_code == 401
        answer = await visitor.post("/dead", [("queue", "work"), ("action", "retry"), ("all", "yes")])
        assert answer.status_code == 401
        assert "memory://" not in answer.text
        assert (await visitor.client.get("/", headers={"Authorization": "Bearer wrong"})).status_code == 401
        assert (await visitor.client.get("/", headers={"Authorization": f"Bearer {TOKEN}"})).status_code == 200


async def test_logging_in_and_out(app: App) -> None:
    async with visiting(app, token=TOKEN) as visitor:
        answer = await visitor.post("/login", [("token", "wrong")])
        assert answer.status_code == 403
        assert "not the dashboard" in answer.text
        answer = await visitor.post("/login", [("token", TOKEN)])
        assert "Overview" in answer.text
        assert TOKEN not in str(visitor.client.cookies)
        assert "Overview" in await visitor.get("/")
        session = visitor.client.cookies["leveret_session"]
        answer = await visitor.post("/logout", [])
        assert "Log in" in answer.text
        assert (await visitor.client.get("/")).status_code == 303
        expires, _, signature = session.partition(".")
        for forged in (
            f"{int(expires) + 1}.{signature}",
            f"1.{signature}",
            "x",
            f"{expires}.",
            f"²{session}",
            "9" * 5_000,
        ):
            headers = {b"Cookie": f"leveret_session={forged}".encode()}
            assert (await visitor.client.get("/", headers=headers)).status_code == 303


def test_a_token_must_be_long(app: App) -> None:
    with pytest.raises(ConfigurationError, match="at least 12"):
        dashboard(app, token="short")


async def test_another_hosts_name_is_not_answered(app: App) -> None:
    async with visiting(app, hosts=["dashboard.test", "::1"]) as visitor:
        assert (await visitor.client.get("/")).status_code == 200
        assert (await visitor.client.get("/", headers={"Host": "[::1]:8484"})).status_code == 200
        for host in ("evil.test", "dashboard.test.evil.test", "[", ""):
            assert (await visitor.client.get("/", headers={"Host": host})).status_code == 421


async def test_it_is_mounted_in_another_application(app: App) -> None:
    served = dashboard(app, token=None)
    web = Starlette(routes=[Mount("/leveret", served)])
    await app.client.broker.declare([Queue("work")])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=web), base_url=ADDRESS) as client:
        answer = await client.get("/leveret", follow_redirects=True)
        assert "Overview" in answer.text
        assert str(answer.url) == f"{ADDRESS}/leveret/"
        for one in Page(answer.text).all("a"):  # all within the folder that it is mounted as
            assert not (one["href"] or "").startswith(("/", "http"))
        assert (await client.get("/leveret/dashboard.css")).status_code == 200
        content = {"form": client.cookies["leveret_form"], "queue": "work", "action": "pause"}
        answer = await client.post("/leveret/queue", data=content, headers={"Origin": ADDRESS}, follow_redirects=True)
        assert str(answer.url).startswith(f"{ADDRESS}/leveret/queue?name=work")
        assert "The queue is paused" in answer.text
    served.close()
    await app.close()


async def test_news_are_streamed(app: App) -> None:
    served = dashboard(app, token=None)
    await app.client.broker.declare([Queue("work")])
    sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": "/events",
        "root_path": "",
        "query_string": b"",
        "headers": [],
    }
    scope |= {"scheme": "http", "http_version": "1.1", "server": ("dashboard.test", 80), "asgi": {"version": "3.0"}}

    async def send(message: Any) -> None:
        sent.put_nowait(message)

    stream = asyncio.ensure_future(served(scope, receive, send))
    start = await sent.get()
    assert dict(start["headers"])[b"content-type"].startswith(b"text/event-stream")
    first = await sent.get()
    await app.tasks[0].enqueue("cat.png", 80)
    following = await sent.get()
    assert re.search(rb"data: \d+\n\n", first["body"])
    assert re.fullmatch(rb"data: \d+\n\n", following["body"])
    assert first["body"].split(b"data: ")[1] != following["body"].split(b"data: ")[1]
    served.close()  # the stream ends with the dashboard
    await stream
    gone.set()
    await app.close()


async def test_after_a_time_in_which_nobody_looked_the_page_tells_what_is_now(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Observer(app)

    async def knows() -> bool:
        return bool(observer.tasks.failures())

    async def rests() -> bool:
        return not observer.asking

    await bury(app.client.broker, [dead(1)], "ValueError")
    observer.look()
    await until(knows, "the failure is known")
    monkeypatch.setattr("leveret.dashboard.observer.IDLE", 0.0)
    await until(rests, "nothing is asked any more")
    await app.client.broker.dead_letters.drop("work", [dead(1).id])
    monkeypatch.undo()
    observer.look()
    assert (observer.stats, observer.tasks.latest(), observer.tasks.failures()) == ((), [], [])
    await observer.first_answer()
    assert [one.dead for one in observer.stats] == [0]
    observer.close()
    await app.close()


async def test_whatever_goes_wrong_is_told_and_asked_again(app: App, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemoryQueues):
        async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
            raise RuntimeError(f"no {queues}")

    store = MemoryStore()
    broker = MemoryBroker(store)
    broker.queues = Broken(store, MemoryStatuses(store, 60.0))
    with app.client.enqueuing_to(broker):
        observer = Observer(app)
        observer.look()
        await observer.first_answer()
        assert observer.problem == "RuntimeError: no ['work']"
        assert observer.asking
        observer.close()
    assert "the broker cannot be asked" in caplog.text


async def test_a_broker_that_is_away_is_told_on_the_page(tmp_path: Path) -> None:
    (tmp_path / "leveret.db").write_text("this is no database, " * 100)
    async with visiting(App(f"sqlite:///{tmp_path / 'leveret.db'}")) as visitor:
        page = await visitor.get("/")
        assert "The broker does not answer." in page
        answer = await visitor.post("/queue", [("queue", "work"), ("action", "pause")])
        assert answer.status_code == 503


async def test_a_session_ends_at_the_log_out_whoever_has_its_cookie(app: App) -> None:
    async with visiting(app, token=TOKEN) as visitor:
        await visitor.post("/login", [("token", TOKEN)])
        stolen = {"Cookie": f"leveret_session={visitor.client.cookies['leveret_session']}"}
        visitor.client.cookies.delete("leveret_session")
        assert (await visitor.client.get("/", headers=stolen)).status_code == 200
        await visitor.post("/login", [("token", TOKEN)])
        other = {"Cookie": f"leveret_session={visitor.client.cookies['leveret_session']}"}
        await visitor.post("/logout", [])
        visitor.client.cookies.delete("leveret_session")
        assert (await visitor.client.get("/", headers=other)).status_code == 303
        assert (await visitor.client.get("/", headers=stolen)).status_code == 200, "another session lives on"


async def test_wrong_tokens_are_logged_and_slowed_however_they_are_given(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    async with visiting(app, token=TOKEN) as visitor:
        began = time.monotonic()
        answers = await asyncio.gather(
            *(visitor.client.get("/", headers={"Authorization": f"Bearer guess-{n}"}) for n in range(6)),
            *(visitor.client.get(f"/?token=guess-{n}") for n in range(6)),
            visitor.post("/login", [("token", "guess-99")]),
        )
        assert time.monotonic() - began > 2.0  # five at once, and a second for each
        assert {one.status_code for one in answers} == {401, 403}
        assert answers[0].headers["www-authenticate"] == "Bearer"
        assert (await visitor.client.get("/", headers={"Authorization": f"bearer {TOKEN}"})).status_code == 200
    assert "a wrong token was given to the dashboard, from 127.0.0.1" in caplog.text
    assert "guess" not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("leveret"))
    assert len([record for record in caplog.records if record.name == "leveret.dashboard"]) == 1


async def test_too_many_wrong_tokens_are_refused(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.dashboard.security._AT_ONCE", 1)
    monkeypatch.setattr("leveret.dashboard.security._MOST_WAITING", 2)
    async with visiting(app, token=TOKEN) as visitor:
        headers = {"Authorization": "Bearer guess"}
        answers = await asyncio.gather(*(visitor.client.get("/", headers=headers) for _ in range(5)))
        assert sorted(one.status_code for one in answers) == [401, 401, 429, 429, 429]


@pytest.mark.parametrize("body", [b"form=" + b"x" * 1_000_000, b"a&" * 400_000, b"%41" * 300_000])
async def test_a_large_login_costs_nothing(app: App, body: bytes) -> None:
    async with visiting(app, token=TOKEN) as visitor:
        answer = await visitor.client.post("/login", content=body, headers={"Origin": ADDRESS})
        assert answer.status_code == 413


async def test_a_form_of_too_many_fields_is_refused(app: App) -> None:
    async with visiting(app) as visitor:
        answer = await visitor.client.post("/dead", content=b"a=&" * 300_000, headers={"Origin": ADDRESS})
        assert answer.status_code == 413


async def test_a_form_that_does_not_end_is_given_up(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.dashboard.site._FORM_WITHIN", 0.1)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"form="
        await asyncio.Event().wait()

    served = dashboard(app, token=TOKEN)
    sent: list[dict[str, Any]] = []
    bodies = slowly()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": await anext(bodies), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/login",
        "root_path": "",
        "query_string": b"",
        "headers": [],
        "scheme": "http",
        "http_version": "1.1",
        "server": ("dashboard.test", 80),
        "asgi": {"version": "3.0"},
    }
    await served(scope, receive, send)
    assert sent[0]["status"] == 408
    served.close()
    await app.close()


def test_who_may_look_must_be_said(app: App) -> None:
    with pytest.raises(ConfigurationError, match=r"who may look.*token=None"):
        dashboard(app)


async def test_bodies_of_dead_letters_are_not_held_for_a_list(app: App) -> None:
    async with visiting(app) as visitor:
        large = Envelope(new_id(), "work", "resize", b'{"args": ["%s"]}' % (b"x" * 400_000))
        small = Envelope(new_id(), "work", "resize", b'{"args": ["cat.png", 1]}')
        await bury(app.client.broker, [large, small], "ValueError: " + "long " * 3_000, "Traceback " * 1_000)
        assert large.id in await visitor.get("/dead?queue=work")
        observer = Observer(app)
        for letter in await observer.dead_letters.listed("work", 2):
            assert (letter.envelope.body, letter.traceback) == (b"", "")
            assert len(letter.reason) < 1_200
        assert "too large for a page" in await visitor.get(f"/task?id={large.id}")
        assert "cat.png" in await visitor.get(f"/task?id={small.id}")


async def _scheduled(app: App, name: str = "nightly", *words: Any) -> None:
    await app.schedules.put(name, app.tasks[0].call(*(words or ("secret.png", 80))), every(days=30, jitter=60))


async def test_schedules_are_shown_and_searched(app: App) -> None:
    async with visiting(app) as visitor:
        assert "No schedules" in await visitor.get("/schedules")
        await _scheduled(app)
        await _scheduled(app, "weekly")
        page = Page(await visitor.get("/schedules"))
        assert any(one.get("href") == "schedules" for one in page.all("a"))
        for shown in ("nightly", "weekly", "every 30 days, up to 1 minute later", "active", 'resize(path="secret.png"'):
            assert shown in page.text
        assert "weekly" not in await visitor.get("/schedules?name=NIGHT")
        assert "No schedule&#39;s name" in (await visitor.get("/schedules?name=x")).replace("'", "&#39;")


async def test_a_schedules_arguments_are_redacted(app: App) -> None:
    async with visiting(app, redact=by_name(["path"])) as visitor:
        await _scheduled(app)
        page = await visitor.get("/schedules")
        assert "path=(hidden), width=80" in page
        assert "secret" not in page


async def test_a_schedule_is_paused_resumed_and_triggered(app: App) -> None:
    async with visiting(app) as visitor:
        await _scheduled(app)

        async def do(action: str) -> str:
            return (await visitor.post("/schedules", [("name", "nightly"), ("action", action)])).text

        assert "The schedule is paused" in await do("pause")
        assert [row.paused async for row in app.schedules] == [True]
        assert "paused</span>" in await visitor.get("/schedules")
        assert "The schedule goes on" in await do("resume")
        assert [row.paused async for row in app.schedules] == [False]
        assert "A task of the schedule is enqueued." in await do("trigger")
        assert [one.ready for one in await app.client.broker.queues.stats()] == [1]
        answer = await visitor.post("/schedules", [("name", "nightly"), ("action", "remove")])
        assert answer.status_code == 400
        answer = await visitor.post("/schedules", [("name", "nothing"), ("action", "pause")])
        assert answer.status_code == 503
        assert "does not exist" in answer.text


async def test_a_schedule_is_not_changed_from_elsewhere(app: App) -> None:
    async with visiting(app) as visitor:
        await _scheduled(app)
        fields = [("name", "nightly"), ("action", "pause")]
        assert (await visitor.post("/schedules", fields, Origin="http://elsewhere.test")).status_code == 403
        assert (await visitor.post("/schedules", [("form", "other"), *fields])).status_code == 403
        assert [row.paused async for row in app.schedules] == [False]


async def test_a_schedule_with_a_hostile_name(app: App) -> None:
    name = '<script>alert("1")</script>&\' onload=x'
    async with visiting(app) as visitor:
        await _scheduled(app, name, HOSTILE[0], 1)
        page = await visitor.get("/schedules")
        assert "<script>alert" not in page
        assert "<img src=x" not in page
        await visitor.post("/schedules", [("name", text.packed(name)), ("action", "pause")])
        assert [row.paused async for row in app.schedules] == [True]


async def test_a_locked_dashboard_shows_no_schedules(app: App) -> None:
    async with visiting(app, token=TOKEN) as visitor:
        await _scheduled(app)
        assert "nightly" not in await visitor.get("/schedules")
        answer = await visitor.client.post("/schedules", content="name=nightly&action=pause")
        assert answer.status_code in (401, 403)
        assert [row.paused async for row in app.schedules] == [False]


async def test_what_waits_in_a_queue_is_shown(app: App) -> None:
    async with visiting(app, redact=by_name(["path"])) as visitor:
        task = app.tasks[0]
        first = await task.options(priority=2).enqueue("secret.png", 80)
        urgent = await task.options(priority=7).enqueue("secret.png", 81)
        later = await task.options(delay=600).enqueue("secret.png", 82)
        await until(lambda: _source_with(visitor, "/queue?name=work", "waiting?name=work"), "they are counted")
        source = await visitor.get("/waiting?name=work")
        page = Page(source)
        shown = [source.find(f"task?id={one.id}") for one in (urgent, first, later)]
        assert -1 < shown[0] < shown[1] < shown[2]
        for words in ("path=(hidden), width=80", "path=(hidden), width=82", "Ready: 2", "Delayed: 1"):
            assert words in page.text
        assert "secret" not in source
        assert "Nothing is known" not in await visitor.get(f"/task?id={later.id}")
        await app.client.broker.queues.purge("work")
        await visitor.post("/queue?name=work", [("queue", "work"), ("action", "pause")])
        source = await visitor.get("/waiting?name=work")
        assert "Nothing is ready" in source
        assert "Nothing is delayed" in source


async def test_why_what_waits_is_not_shown(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise PeekRefused("it would count <b>each</b> look")

    async with visiting(app) as visitor:
        await app.client.broker.declare([Queue("work")])
        monkeypatch.setattr(app.client.broker.queues, "peek", refuse)
        await until(lambda: _source_with(visitor, "/", "queue?name=work"), "the queue is known")
        assert "it would count &lt;b&gt;each" in await visitor.get("/waiting?name=work")
        assert (await visitor.client.get("/waiting?name=nothing")).status_code == 404
