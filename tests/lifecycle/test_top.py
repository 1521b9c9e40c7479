"""``leveret top`` with real workers on every broker: in a terminal, its keys pressed, and where there is none."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from leveret import Queue
from leveret.brokers import connect
from tests.support import ledger_app
from tests.support.terminal import Terminal
from tests.support.waiting import until
from tests.support.workers import LEDGER_APP, Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place

HOSTILE = "[red]so[/red]\x1b[2J\u202e[/]"


async def test_it_is_steered_by_keys(place: Place, ledger: Ledger) -> None:
    """What runs is shown; a queue is paused and resumed, a dead letter put back; the terminal is left as it was."""
    broker = connect(place.url)

    async def is_paused() -> bool:
        return any(one.name == "work" and one.paused for one in await broker.queues.stats(["work"]))

    with (
        Worker(place.url, ledger).ready(),
        Terminal("top", "--app", LEDGER_APP, "--url", place.url, "--interval", "0.2", width=160, height=40) as top,
    ):
        ledger_app.app.client.connect_to(place.url)
        long = await ledger_app.pause.enqueue("long", 600.0)
        dead = await ledger_app.give_up.enqueue(HOSTILE)
        frame = top.shows(rf"dead +{dead.id}")
        assert r"gave up: [red]so[/red]\x1b[2J\u202e[/]" in frame
        assert "\x1b[2J" not in top.raw.split("leveret top", 1)[1]
        top.shows(r"[0-9] MiB pause +[0-9a-f]{32} work")
        names = [name for name in ("other", "raw", "work") if name in frame]
        top.press("?")
        top.shows("put the dead task back")
        top.press("\x1b")
        top.shows("worker, child")
        top.press("\x1b[B" * (sorted(names).index("work")) + "p")
        top.shows("queue 'work' is paused")
        await until(is_paused, "the queue is paused")
        top.press("r")
        top.shows("queue 'work' goes on")
        assert not await is_paused()
        top.press("c")
        top.shows("move to a task that runs, or is to be tried again, first")
        top.press("\tc")
        top.shows(f"task {long.id} is (told to end|cancelled)")  # as quick as its worker is
        top.shows("1 worker, 0 running")
        top.press("\tt")
        top.shows(f"task {dead.id} is back in its queue")
        top.press("kkkkkkkkt")
        top.shows("move to a dead task first")
        top.press("q")
        assert top.exit_code() == 0
        assert top.settings == top.before
    await broker.close()
    await ledger_app.app.close()


@pytest.mark.parametrize("width", [60, 160])
async def test_it_fits(width: int, any_size_url: str, ledger: Ledger) -> None:
    """No line is wider than the terminal, no picture higher, whatever there is; and SIGTERM ends it well."""
    broker = connect(any_size_url)
    await broker.declare([Queue(f"queue-{'x' * 70}-{number}") for number in range(30)])
    ledger_app.app.client.connect_to(any_size_url)
    with (
        Worker(any_size_url, ledger, "--concurrency", "30").ready(),
        Terminal("top", "--url", any_size_url, "--interval", "0.2", width=width, height=20) as top,
    ):
        for number in range(25):
            await ledger_app.pause.enqueue(f"long {number}", 600.0)
            await ledger_app.give_up.enqueue(HOSTILE * 40)
        top.shows(r"[0-9]+ more[\s\S]*dead +")
        lines = top.frame().splitlines()
        assert len(lines) <= 20
        assert all(len(line) <= width for line in lines)
        top.resize(40, 12)
        top.process.send_signal(signal.SIGWINCH)
        top.process.terminate()
        assert top.exit_code() == 0
        assert top.settings == top.before
    await broker.close()
    await ledger_app.app.close()


@pytest.fixture
def any_size_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('top')}/leveret.db"


async def test_plain_lines(place: Place, ledger: Ledger) -> None:
    """One block, without escapes, when it is asked for once."""
    with Worker(place.url, ledger).ready():
        ledger_app.app.client.connect_to(place.url)
        running = await ledger_app.pause.enqueue("long", 600.0)
        dead = await ledger_app.give_up.enqueue(HOSTILE)
        ledger.wait_for("start long")

        async def shown() -> str:
            text = leveret("top", "--once", "--app", LEDGER_APP, "--url", place.url)
            return text if f"{dead.id} queue=work dead" in text else ""

        text = await until(shown, "the dead task is told of")
        assert f" {running.id} child=" in text
        assert "queue work ready=" in text
        assert "\x1b" not in text
        assert "\u202e" not in text
    await ledger_app.app.close()
