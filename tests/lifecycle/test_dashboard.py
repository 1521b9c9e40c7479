"""The dashboard as a person sees it: in Chromium, with real workers, on SQLite and RabbitMQ.

What the pages look like is in build/screenshots/ afterwards.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from playwright.async_api import async_playwright, expect

from leveret import App, Rate
from leveret.brokers import connect
from leveret.dashboard.text import packed
from leveret.model import LIMITS, DeclareLimits, Envelope, LimitRule, Queue, RestLimit, SetLimit
from tests.support import dashboard_app as shop
from tests.support.dashboard import Page, bury, visiting
from tests.support.waiting import PATIENCE
from tests.support.workers import Program, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from playwright.async_api import Browser
    from playwright.async_api import Page as Tab

    from tests.conftest import Place
    from tests.support.workers import Ledger

BROWSER = shutil.which("chromium")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SHOP = f"{Path(shop.__file__)}:app"
DESKTOP = {"width": 1280, "height": 900}
TABLET = {"width": 820, "height": 1180}
PHONE = {"width": 390, "height": 844}
TOKEN = "the token of the test"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium: scripts/install-browser could not install it")


class Dashboard(Program):
    """``leveret dashboard``; ``asks``: for a token of its own. ``descriptors``: so many it may have."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *options: str,
        token: str | None = None,
        asks: bool = False,
        descriptors: int | None = None,
    ) -> None:
        environment = {"LEDGER": str(folder / "ledger")}
        if token is not None:
            environment["LEVERET_DASHBOARD_TOKEN"] = token
        elif not asks:
            options = ("--no-token", *options)
        program = ["-m", "leveret"]
        if descriptors is not None:
            limited = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({descriptors}, {descriptors}))"
            program = ["-c", f"{limited}; from leveret.cli import main; main()"]
        super().__init__(
            [*program, "dashboard", SHOP, "--url", url, "--port", "0", "--redact", "password", *options],
            folder / "dashboard.log",
            environment,
        )

    @property
    def address(self) -> str:
        self.wait_for("is at http")
        found = re.search(r"is at (http://\S+)", self.output)
        assert found is not None
        return found[1]


@pytest.fixture
def dashboard(place: Place, tmp_path: Path) -> Iterator[Dashboard]:
    with Dashboard(place.url, tmp_path) as program:
        yield program


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    # The switches keep it from looking for its maker's servers.
    switches = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=BROWSER, args=[*switches, "--disable-component-update", "--disable-sync"]
        )
        yield browser
        await browser.close()


@asynccontextmanager
async def tab(
    browser: Browser, address: str, *, size: dict[str, int] = DESKTOP, scheme: str = "light"
) -> AsyncIterator[Tab]:
    """A page that makes the test fail when the browser complains of it: a script's error, or the policy."""
    context = await browser.new_context(viewport=size, color_scheme=scheme, locale="en-GB")  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE * 1000)
    page = await context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    await page.goto(address)
    yield page
    assert [one for one in complaints if "Failed to load resource" not in one] == []
    await context.close()


async def look(page: Tab, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    await page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


async def test_a_task_is_followed_from_its_start_to_its_retry(
    place: Place, dashboard: Dashboard, ledger: Ledger, tmp_path: Path
) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    with Worker(place.url, ledger, "--processes", "2", app=SHOP) as worker:
        worker.ready()
        async with browsing() as browser, tab(browser, dashboard.address) as page:
            await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
            shop.app.client.connect_to(place.url)
            async with shop.app:
                handle = await shop.import_orders.enqueue("orders.csv", rows=40)
                await _follow_a_run(page, handle.id, tmp_path, place.kind)
                await shop.resize.enqueue_many([(f"photos/{number}.jpg", 80 + number % 50) for number in range(300)])
                dead = [await shop.send_invoice.enqueue(customer, "hunter2") for customer in ("Ann", "Bob", "Cleo")]
            await _retry_by_keyboard(page, dead[0].id, tmp_path, place.kind)
            await expect(page.get_by_role("link", name=re.compile("Dead letters"))).to_contain_text("2")
            await page.get_by_role("link", name="Overview").click()
            await expect(page.get_by_role("table", name="Latest tasks").get_by_role("row")).not_to_have_count(1)
            await expect(page.get_by_role("img", name=re.compile(r"Throughput: now finished \d"))).to_be_visible()
            if place.kind != "rabbitmq-3.10":  # it looks as with the newer one
                await _look_at_all(browser, page, dashboard.address, dead[1].id, handle.id, place.kind)


async def _follow_a_run(page: Tab, id_: str, folder: Path, kind: str) -> None:
    """From the list to the task, and its progress without a reload."""
    await page.get_by_role("region", name="Latest tasks").get_by_role("link", name="import_orders").click()
    await expect(page.get_by_role("heading", name="import_orders")).to_contain_text("running")
    await expect(page.get_by_role("progressbar", name="Progress")).to_have_attribute("value", "50")
    await expect(page.get_by_text("orders.csv, row 20")).to_be_visible()
    await expect(page.get_by_role("region", name="Arguments")).to_contain_text("orders.csv")
    await look(page, f"{kind}-task-running")
    await page.get_by_role("link", name="Workers").click()
    await expect(page.get_by_role("table")).to_contain_text("import_orders")
    await look(page, f"{kind}-workers")
    await page.go_back()
    await page.evaluate("window.same = true")
    (folder / "ledger.orders").touch()
    await expect(page.get_by_role("heading", name="import_orders")).to_contain_text("succeeded")
    await expect(page.get_by_role("region", name="Result")).to_contain_text("40")
    await expect(page.get_by_role("region", name="Arguments")).to_contain_text("orders.csv")
    assert await page.evaluate("window.same"), "it was changed, not loaded again"
    assert id_ in page.url


async def _retry_by_keyboard(page: Tab, id_: str, folder: Path, kind: str) -> None:
    """With Tab, Space and Enter alone."""
    await page.goto(page.url.rpartition("/")[0] + "/dead?queue=work")
    await expect(page.get_by_role("table").get_by_role("row")).to_have_count(4)
    await look(page, f"{kind}-dead")
    (folder / "ledger.mail").touch()
    await _tab_to(page, f"input[name=id][value='{id_}']")
    await page.keyboard.press("Space")
    await expect(page.locator(f"input[name=id][value='{id_}']")).to_be_checked()
    for _ in range(3):  # news come in meanwhile, and what was chosen stays so
        await page.wait_for_event("response", predicate=lambda answer: "dead?queue=work" in answer.url)
    await expect(page.locator(f"input[name=id][value='{id_}']")).to_be_checked()
    await expect(page.locator(f"input[name=id][value='{id_}']")).to_be_focused()
    await _tab_to(page, "#retry-chosen", keys="Shift+Tab")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("1 dead letter put back into the queue.")).to_be_focused()
    await page.goto(f"{page.url.rpartition('/')[0]}/task?id={id_}")
    await expect(page.get_by_role("heading", name="send_invoice")).to_contain_text("succeeded")
    await expect(page.get_by_role("region", name="Timeline")).to_contain_text("dead")


async def _tab_to(page: Tab, selector: str, *, keys: str = "Tab") -> None:
    for _ in range(60):
        if await page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
        await page.keyboard.press(keys)
    raise AssertionError(f"{selector} cannot be reached with {keys}")


async def _look_at_all(browser: Browser, page: Tab, address: str, dead: str, done: str, kind: str) -> None:
    """Screenshots; and that nothing is wider than a phone, or a tablet."""
    pages = {
        "overview": "",
        "queue": "queue?name=work",
        "waiting": "waiting?name=work",
        "tasks": "tasks",
        "task-dead": f"task?id={dead}",
        "task-done": f"task?id={done}",
        "workers": "workers",
        "schedules": "schedules",
        "limits": "limits",
        "dead": "dead?queue=work",
    }
    for name, path in pages.items():
        await page.goto(address + path)
        await look(page, f"{kind}-desktop-{name}")
    dark = ("overview", "task-dead")
    for look_like, size, scheme, names in (
        ("phone", PHONE, "light", tuple(pages)),
        ("tablet", TABLET, "light", ("overview", "queue")),
        ("phone-dark", PHONE, "dark", dark),
        ("dark", DESKTOP, "dark", dark),
    ):
        async with tab(browser, address, size=size, scheme=scheme) as other:
            for name in names:
                await other.goto(address + pages[name])
                await look(other, f"{kind}-{look_like}-{name}")
                width = await other.evaluate("document.documentElement.scrollWidth")
                assert width <= size["width"], f"{name} is {width} px wide"


async def test_dead_letters_are_dropped_in_bulk_after_a_question(
    place: Place, dashboard: Dashboard, ledger: Ledger
) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    shop.app.client.connect_to(place.url)
    with Worker(place.url, ledger, app=SHOP) as worker:
        worker.ready()
        async with shop.app:
            for customer in ("Ann", "Bob", "Cleo"):
                await shop.send_invoice.enqueue(customer, "hunter2")
        async with browsing() as browser, tab(browser, f"{dashboard.address}dead?queue=work") as page:
            await expect(page.get_by_role("table").get_by_role("row")).to_have_count(4)
            await page.get_by_label("Error").fill("bob")
            await page.get_by_role("button", name="Search").click()
            await expect(page.get_by_role("table").get_by_role("row")).to_have_count(2)
            await page.get_by_label("Error").fill("")
            await page.get_by_role("button", name="Search").click()
            await page.get_by_label("All shown").check()
            await page.get_by_role("button", name="Drop chosen").click()
            await expect(page.get_by_role("heading", name="Drop 3 dead letters for good?")).to_be_visible()
            await look(page, f"{place.kind}-confirm")
            await page.get_by_role("button", name="Drop").click()
            await expect(page.get_by_text("3 dead letters deleted for good.")).to_be_visible()
            await expect(page.get_by_text("All is well")).to_be_visible()


async def test_a_queue_is_paused_in_the_browser(place: Place, dashboard: Dashboard) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    broker = connect(place.url)
    await broker.declare([Queue("work"), Queue("other")])
    async with browsing() as browser, tab(browser, dashboard.address) as page:
        await page.get_by_role("button", name="Pause queue work").click()
        await expect(page.get_by_text("The queue is paused")).to_be_focused()
        await page.get_by_role("link", name="Overview").first.click()
        await expect(page.get_by_role("row", name=re.compile("^work"))).to_contain_text("paused")
        await page.get_by_role("button", name="Resume queue work").click()
        await expect(page.get_by_text("The queue goes on")).to_be_visible()
    stats = {one.name: one.paused for one in await broker.queues.stats(["work"])}
    assert stats["work"] is False
    await broker.close()


async def test_a_schedule_is_paused_and_triggered_in_the_browser(
    place: Place, dashboard: Dashboard, ledger: Ledger
) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    with Worker(place.url, ledger, app=SHOP).ready():
        async with browsing() as browser, tab(browser, dashboard.address) as page:
            await page.get_by_role("link", name="Schedules").click()
            row = page.get_by_role("row", name=re.compile("monthly report"))
            await expect(row).to_contain_text("30 2 1 * * (Europe/Berlin)")
            await expect(row).to_contain_text('month="last"')
            await look(page, f"{place.kind}-schedules")
            await page.get_by_role("button", name="Pause monthly report").click()
            await expect(page.get_by_text("The schedule is paused")).to_be_focused()
            await expect(row).to_contain_text("paused")
            await page.get_by_role("button", name="Trigger monthly report").click()
            await expect(page.get_by_text("A task of the schedule is enqueued.")).to_be_visible()
            await page.get_by_role("button", name="Resume monthly report").click()
            await expect(row).to_contain_text("active")
            await page.get_by_role("link", name="Tasks").click()
            await expect(page.get_by_role("table")).to_contain_text("monthly report@")


async def test_a_limit_is_paused_in_the_browser(place: Place, dashboard: Dashboard) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    broker = connect(place.url)
    await broker.declare([Queue("work")])
    rules = {"stripe": LimitRule(20, Rate(100, per=60)), "tenants": LimitRule(3), "queue:work": LimitRule(40)}
    await broker.limits.ask(DeclareLimits(1.0, rules, ["work"]))
    await broker.limits.ask(SetLimit("stripe", LimitRule(5, Rate(100, per=60))))
    for key in ("acme", "a tenant with a name that is as long as somebody made it, and then a little longer"):
        await broker.limits.ask(RestLimit("tenants", key, time.time() + 500))
    headers = {LIMITS: '[["stripe",""],["tenants","acme"]]'}
    await broker.publish([Envelope(str(number), "work", "resize", b"{}", headers=headers) for number in range(1_234)])
    async with browsing() as browser, tab(browser, dashboard.address) as page:
        await expect(page.get_by_role("row", name=re.compile("^work"))).to_contain_text("1\u202f234")
        await look(page, f"{place.kind}-limited")
        await page.get_by_role("link", name="Limits").first.click()
        row = page.get_by_role("row", name=re.compile("stripe"))
        await expect(row).to_contain_text("5 at once, 100/minute")
        await expect(row).to_contain_text("the code says 20 at once")
        await look(page, f"{place.kind}-desktop-limits-waiting")
        await page.get_by_role("button", name="Pause stripe").click()
        await expect(page.get_by_text("The limit is paused")).to_be_focused()
        await expect(row).to_contain_text("paused")
        await page.get_by_role("button", name="Resume tenants").click()
        await expect(page.get_by_text("The limit goes on.")).to_be_visible()
        async with tab(browser, f"{dashboard.address}limits", size=PHONE) as phone:
            await look(phone, f"{place.kind}-phone-limits-waiting")
            assert await phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    state = {one.row.name: one.row.state(time.time()) for one in await broker.limits.read()}
    assert state == {"stripe": "paused", "tenants": "active", "queue:work": "active"}
    await broker.close()


async def test_readers_and_changes_take_turns_at_the_dead_letters(place: Place) -> None:
    """RabbitMQ hands each dead letter to one reader at a time."""
    letters = [Envelope(f"{number:032x}", "work", "resize", b"{}") for number in range(20)]
    async with visiting(App(place.url)) as visitor:
        broker = connect(place.url)
        await bury(broker, letters, "ValueError")
        fields = [("queue", "work"), ("action", "retry"), ("all", "yes")]
        reading = [asyncio.ensure_future(visitor.get("/dead?queue=work")) for _ in range(5)]
        answer = await visitor.post("/dead?queue=work", fields)
        pages = await asyncio.gather(*reading)
        assert "20 dead letters put back" in answer.text
        for page in pages:
            shown = len([one for one in Page(page).all("input") if one.get("name") == "id"])
            assert shown in (0, 20), "all of them, or none when they are back"
        await broker.close()


async def test_the_page_says_when_the_dashboard_is_gone(tmp_path: Path) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    with Dashboard(f"sqlite:///{tmp_path / 'leveret.db'}", tmp_path, token=TOKEN) as dashboard:
        async with browsing() as browser, tab(browser, dashboard.address) as page:
            await look(page, "login")
            await page.get_by_label("Token").fill(TOKEN)
            await page.keyboard.press("Enter")
            await expect(page.get_by_role("button", name="Live updates")).to_contain_text("Live")
            dashboard.signal(15)
            await asyncio.to_thread(dashboard.exit_code)  # though the page still listens
            await expect(page.get_by_role("button", name="Live updates")).to_contain_text("Offline")


async def test_a_page_whose_broker_is_away_says_so_and_stays(tmp_path: Path) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    broker = connect(url := f"sqlite:///{tmp_path / 'leveret.db'}")
    await bury(broker, [Envelope("1", "work", "resize", b"{}")], "ValueError")
    with Dashboard(url, tmp_path) as dashboard:
        async with browsing() as browser, tab(browser, f"{dashboard.address}dead") as page:
            box = page.get_by_label("Choose resize 1")
            await box.check()
            refused = '<main id="main"><p class="reason">the broker is <b>away</b></p></main>'
            await page.route("**/dead", lambda route: route.fulfill(status=503, body=refused))
            await bury(broker, [Envelope("2", "work", "resize", b"{}")], "ValueError")
            await expect(page.get_by_role("alert")).to_have_text("the broker is away. What is shown may be old.")
            await expect(box).to_be_checked()
            await page.unroute("**/dead")
            await bury(broker, [Envelope("3", "work", "resize", b"{}")], "ValueError")
            await expect(page.get_by_label("Choose resize 3")).to_be_visible()
            await expect(page.get_by_role("alert")).to_have_count(0)
            await expect(box).to_be_checked()
    await broker.close()


async def test_what_was_done_stays_on_top_when_the_page_changes(tmp_path: Path) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    broker = connect(url := f"sqlite:///{tmp_path / 'leveret.db'}")
    await bury(broker, [Envelope(str(number), "work", "resize", b"{}") for number in (1, 2)], "ValueError")
    with Dashboard(url, tmp_path) as dashboard:
        async with browsing() as browser, tab(browser, f"{dashboard.address}dead") as page:
            await page.get_by_role("button", name="Retry chosen").click()
            await expect(page.get_by_text("Nothing was chosen, so nothing was done.")).to_be_visible()
            await page.get_by_label("Choose resize 1").check()
            await page.get_by_role("button", name="Retry chosen").click()
            await bury(broker, [Envelope("3", "work", "resize", b"{}")], "ValueError")
            await expect(page.get_by_label("Choose resize 3")).to_be_visible()
            said = await page.get_by_text("1 dead letter put back into the queue.").bounding_box()
            heading = await page.get_by_role("heading", name="Dead letters").bounding_box()
            assert said is not None
            assert heading is not None
            assert said["y"] < heading["y"]
            await page.goto(f"{dashboard.address}task?id={packed('2')}")
            await page.get_by_role("button", name="Retry").click()
            await expect(page.get_by_text("The task is back in its queue.")).to_be_visible()
            await expect(page.get_by_role("heading", name="resize")).to_contain_text("queued")
    await broker.close()


async def test_a_stream_that_ends_in_time_is_no_loss(tmp_path: Path) -> None:
    expect.set_options(timeout=PATIENCE * 1000)
    short = {"status": 200, "content_type": "text/event-stream", "body": "retry: 100\ndata: 1\n\n"}
    with Dashboard(f"sqlite:///{tmp_path / 'leveret.db'}", tmp_path) as dashboard:
        async with browsing() as browser, tab(browser, dashboard.address) as page:
            await page.evaluate(
                """window.states = []; const live = document.getElementById("live");
                new MutationObserver(() => states.push(live.dataset.state)).observe(live, { attributes: true })"""
            )
            await page.route("**/events", lambda route: route.fulfill(**short))
            await page.get_by_role("button", name="Live updates").click()
            for _ in range(3):
                async with page.expect_request("**/events"):
                    if await page.get_by_role("button", name="Live updates").get_attribute("aria-pressed") == "false":
                        await page.get_by_role("button", name="Live updates").click()
            assert set(await page.evaluate("states")) == {"paused", "live"}


async def test_the_printed_address_lets_its_reader_in_and_nobody_else(tmp_path: Path) -> None:
    """Without a token of the operator's: for a program without scripts, and in a browser, until the log-out."""
    expect.set_options(timeout=PATIENCE * 1000)
    with Dashboard(f"sqlite:///{tmp_path / 'leveret.db'}", tmp_path, asks=True) as dashboard:
        address, _, token = dashboard.address.partition("?token=")
        assert len(token) >= 32
        async with httpx.AsyncClient(base_url=address) as stranger:
            assert (await stranger.get("/")).headers["location"] == "login"
            for path in ("/?token=wrong-wrong-wrong", "/login?token=wrong-wrong-wrong"):
                assert (await stranger.get(path)).status_code == 403
            dashboard.wait_for("a wrong token was given to the dashboard, from 127.0.0.1")
            assert (await stranger.get("/")).status_code == 303
            linked = await stranger.get(f"/dead?queue=work&token={token}")
            assert linked.headers["location"] == "dead?queue=work"
            assert (await stranger.get("/dead?queue=work")).status_code == 200
        async with browsing() as browser, tab(browser, dashboard.address) as page:
            await expect(page.get_by_role("heading", name="Overview")).to_be_visible()
            assert page.url == address
            requests: list[str] = []
            page.on("request", lambda request: requests.append(f"{request.url} {request.headers.get('referer')}"))
            await page.get_by_role("link", name="Tasks").click()
            await look(page, "with-a-session")
            (cookie,) = [one for one in await page.context.cookies() if one["name"] == "leveret_session"]
            assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
            await page.get_by_role("button", name="Log out").click()
            await expect(page.get_by_role("heading", name="Log in")).to_be_visible()
            assert requests
            assert not [one for one in requests if token in one]
        async with httpx.AsyncClient(base_url=address) as thief:
            thief.cookies.set("leveret_session", cookie["value"])
            assert (await thief.get("/")).headers["location"] == "login"
        assert dashboard.output.count(token) == 1
        assert "wrong-wrong" not in dashboard.output


def test_how_a_token_is_asked_for(tmp_path: Path) -> None:
    url = ("--url", f"sqlite:///{tmp_path / 'leveret.db'}", "--port", "0")
    token = {"LEVERET_DASHBOARD_TOKEN": TOKEN}
    assert "exclude" in leveret("dashboard", *url, "--no-token", environment=token, fails=True)
    assert "at least 12" in leveret("dashboard", *url, "--token", "short", fails=True)
    with Dashboard(url[1], tmp_path, token=TOKEN) as dashboard:
        assert "token" not in dashboard.address
    with Dashboard(url[1], tmp_path, "--host", "0.0.0.0", asks=True) as dashboard:
        assert "?token=" in dashboard.address
    with Dashboard(url[1], tmp_path, "--host", "0.0.0.0") as dashboard:
        assert "token" not in dashboard.address
        assert "nobody is asked for a token" in dashboard.output
    with Dashboard(url[1], tmp_path, "--allow-host", "dash.example") as dashboard:
        for name, status in (("dash.example", 200), ("evil.example", 421)):
            assert httpx.get(dashboard.address, headers={"Host": name}).status_code == status


async def test_slow_clients_lock_nobody_out_and_fill_no_log(tmp_path: Path) -> None:
    """300 half requests, slow bodies and nonsense, where the program has 256 descriptors."""
    url = f"sqlite:///{tmp_path / 'leveret.db'}"
    with Dashboard(url, tmp_path, token=TOKEN, descriptors=256) as dashboard:
        port = int(dashboard.address.rpartition(":")[2].strip("/"))
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        slow = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\nform="
        for number, (_, writer) in enumerate(held):
            writer.write((b"GET / HTTP/1.1\r\nHost: loc", slow, b"\x00nonsense\r\n\r\n")[number % 3])
        async with httpx.AsyncClient(base_url=dashboard.address, timeout=PATIENCE) as reader:
            for _ in range(20):
                assert (await reader.get("/login")).status_code == 200
            headers = {"Authorization": f"Bearer {TOKEN}"}
            for _ in range(20):
                assert (await reader.get("/", headers=headers)).status_code == 200
        for _, writer in held:
            writer.close()
        assert len(dashboard.output) < 5_000, dashboard.output[:2_000]


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'leveret.db'}"
    with Dashboard(url, tmp_path) as dashboard:
        port = dashboard.address.rpartition(":")[2].strip("/")
        taken = leveret("dashboard", "--url", url, "--port", port, fails=True)
        assert f"port {port}" in taken


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    """As for somebody who has not installed the extra."""
    (tmp_path / "jinja2.py").write_text("raise ModuleNotFoundError('no', name='jinja2')")
    said = leveret("dashboard", environment={"PYTHONPATH": str(tmp_path), "LEVERET_URL": "memory://"}, fails=True)
    assert "pip install 'leveret[dashboard]'" in said
