"""The command line's own words: options, guesses, times, and what a shell offers at Tab."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

import leveret
from leveret.cli import cli
from leveret.cli.durations import seconds_of
from leveret.testing import under_test

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from leveret.testing import AppUnderTest

SHOP = """
from leveret import App, Queue
app = App(queues=[Queue("images")])
@app.task(queue="mail")
def send(*words: object, **more: object) -> None: ...
@app.task(queue="raw")
def raw(body: bytes) -> None: ...
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppUnderTest]:
    (tmp_path / "shop_words.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LEVERET_URL", f"sqlite:///{tmp_path}/x.db")
    module: Any = __import__("shop_words")
    with under_test(module.app) as test:
        yield test
    sys.modules.pop("shop_words", None)


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["a", "-5", "-.5", "- 5"], None),
        (["a", "--", "--delay", "30", "-x", "--"], ("a", "--delay", 30, "-x", "--")),
        (["--", "-5", "--queue", "no"], (-5, "--queue", "no")),
        (["-5e3", "-"], (-5000.0, "-")),
        (["-5", "--priority", "3", "-7"], (-5, -7)),
    ],
)
def test_what_begins_with_a_dash(shop: AppUnderTest, words: list[str], arguments: tuple[object, ...] | None) -> None:
    if arguments is None:
        run("enqueue", "shop_words:app", "send", *words, code=2)  # a dash, a blank: that may be an option
        words, arguments = words[:-1], ("a", -5, "-.5")
    run("enqueue", "shop_words:app", "send", *words)
    (one,) = shop.enqueued()
    assert isinstance(one.arguments, dict)
    assert one.arguments["words"] == arguments


@pytest.mark.parametrize(
    ("options", "delay", "expires"),
    [
        (["--delay", "30"], 30, None),
        (["--delay=5m"], 300, None),
        (["--delay", "1h30m", "--expires", "2h"], 5_400, 7_200),
        (["--expires", "1.5d"], 0, 129_600),
        (["--delay", "500ms"], 0.5, None),
    ],
)
def test_time_spans(shop: AppUnderTest, options: list[str], delay: float, expires: float | None) -> None:
    run("enqueue", "shop_words:app", "send", *options)
    (one,) = shop.enqueued()
    assert (round(one.delay, 2), one.expires) == (delay, expires)


@pytest.mark.parametrize("zone", ["Z", "+01:00", "-0330"])
def test_a_moment_needs_a_zone(shop: AppUnderTest, zone: str) -> None:
    at = datetime.fromtimestamp(int(time.time()) + 7_200, UTC)
    offset = {"Z": 0, "+01:00": 3_600, "-0330": -12_600}[zone]
    local = datetime.fromtimestamp(at.timestamp() + offset, UTC).replace(tzinfo=None)
    run("enqueue", "shop_words:app", "send", "--at", f"{local.isoformat()}{zone}")
    (one,) = shop.enqueued()
    assert abs(one.delay - (at.timestamp() - time.time())) < 5
    said = run("enqueue", "shop_words:app", "send", "--at", local.isoformat(), code=2)
    assert "has no time zone" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--delya", "3"], "No such option: --delya; did you mean '--delay'? Write -- before arguments"),
        (["-x"], "No such option: -x. Write -- before"),
        (["--delay", "soon"], "'soon' is not a time span"),
        (["--delay", "-5"], "'-5' is not a time span"),
        (["--delay", "nan"], "'nan' is not a time span"),
        (["--delay", "5 m x"], "is not a time span"),
        (["--expires", "2026-01-31T08:00Z"], "is not a time span"),
        (["--at", "tomorrow"], "'tomorrow' is not an ISO 8601 time"),
        (["--priority", "high"], "'high' is not a valid integer"),
        (["--delay"], "requires an argument"),
    ],
)
def test_a_mistake_stores_nothing(shop: AppUnderTest, options: list[str], said: str) -> None:
    assert said in run("enqueue", "shop_words:app", "send", "a", *options, code=2).replace("\n", " ")
    assert shop.enqueued() == []


def test_too_far_and_twice_are_refused(shop: AppUnderTest) -> None:
    for options in (["--delay", "400d"], ["--delay", "1s", "--at", "2026-01-31T08:00Z"]):
        result = CliRunner().invoke(cli, ["enqueue", "shop_words:app", "send", *options])
        assert isinstance(result.exception, leveret.ConfigurationError)
    assert shop.enqueued() == []


def test_all_options_at_once(shop: AppUnderTest) -> None:
    options = ["--queue", "images", "--priority", "7", "--id", "invoice-42", "--delay", "2s", "--expires", "3"]
    run("enqueue", "shop_words:app", "send", "a", *options)
    (one,) = shop.enqueued()
    assert (one.queue, one.priority, one.id, one.delay, one.expires) == ("images", 7, "invoice-42", 2, 3)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("1.5", 1.5), ("2min", 120), ("1w", 604_800), ("1H 5M", 3_900), ("", None), ("m", None), ("5y", None)],
)
def test_seconds(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["wroker"], "No such command 'wroker'; did you mean 'worker'?"),
        (["dead", "retyr"], "No such command 'retyr'; did you mean 'retry'?"),
        (["queues", "pasue", "mail"], "did you mean 'pause'?"),
        (["worker", "--concurency", "3"], "--concurrency"),
    ],
)
def test_a_guess_is_offered(arguments: list[str], said: str) -> None:
    assert said in run(*arguments, code=2)


@pytest.mark.usefixtures("shop")
def test_tasks_and_applications_are_guessed() -> None:
    for arguments, said in (
        (["shop_words:app", "sned"], "'sned'; did you mean 'send'?"),
        (["shop_words:ap", "send"], "no application 'ap'; did you mean 'app'?"),
    ):
        assert said in str(CliRunner().invoke(cli, ["enqueue", *arguments]).exception)


def test_the_version() -> None:
    assert run("-V") == run("--version") == f"{leveret.__version__}\n"


def test_dir_has_what_is_meant_for_others() -> None:
    names = [name for name in dir(leveret) if not name.startswith("__")]
    assert names == sorted(leveret.__all__)
    assert not hasattr(leveret, "Any")


def offered(line: str) -> list[str]:
    """What Tab offers at the end of the line."""
    *words, incomplete = line.split(" ")
    complete = BashComplete(cli, {}, "leveret", "_LEVERET_COMPLETE")
    return [item.value for item in complete.get_completions(words[1:], incomplete)]


@pytest.mark.usefixtures("shop")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("leveret wor", ["worker"]),
        ("leveret worker ", ["shop_words:app"]),
        ("leveret enqueue sh", ["shop_words:app"]),
        ("leveret enqueue shop_words:app ", ["send", "raw"]),
        ("leveret enqueue shop_words:app se", ["send"]),
        ("leveret enqueue shop_words:app send -q ", ["images", "mail", "raw"]),
        ("leveret worker shop_words:app --queue ma", ["mail"]),
        ("leveret queues pa", ["pause"]),
        ("leveret queues pause --app shop_words:app im", ["images"]),
        ("leveret dead list --app shop_words:app m", ["mail"]),
        ("leveret enqueue absent:app ", []),
    ],
)
def test_a_shell_completes(line: str, expected: list[str]) -> None:
    assert offered(line) == expected


def test_a_shell_completes_the_queues_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setenv("LEVERET_URL", f"sqlite:///{tmp_path}/x.db")
    assert offered("leveret queues pause ") == []
    assert list(tmp_path.iterdir()) == []

    async def declare() -> None:
        broker = leveret.App().client.broker
        await broker.declare([leveret.Queue("mail"), leveret.Queue("work")])
        await broker.close()

    asyncio.run(declare())
    assert offered("leveret queues pause ") == ["mail", "work"]
    assert offered("leveret dead list w") == ["work"]
