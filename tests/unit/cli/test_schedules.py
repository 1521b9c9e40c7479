"""``leveret schedules``: what it shows and does, on a file."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from leveret import ConfigurationError, ScheduleNotFound, cron, every
from leveret.brokers import connect
from leveret.cli import cli
from leveret.model import Declare, Envelope, Pause, Put, Queue, Schedule, ScheduleRow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from leveret.brokers import Broker

EVIL = "\x1b]0;owned\x07"


def schedule(name: str, timing: Any, origin: str | None = None) -> Schedule:
    return Schedule(name, timing, Envelope("", "mail", "digest", b'{"args":[42]}'), origin)


def in_file(url: str, act: Callable[[Broker], Awaitable[object]]) -> None:
    async def run() -> None:
        broker = connect(url)
        await act(broker)
        await broker.close()

    asyncio.run(run())


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with a schedule of the code and two that are data, one of them paused."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    url = f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("LEVERET_URL", url)

    async def fill(broker: Broker) -> None:
        await broker.declare([Queue("mail")])
        timing = cron("30 2 * * *", tz="Europe/Berlin", jitter=600)
        await broker.schedules.ask(Declare("shop:app", 1.0, [schedule("nightly", timing, "shop:app")]))
        await broker.schedules.ask(Put(schedule("digest:42", every(days=1))))
        await broker.schedules.ask(Put(schedule("hourly", every(hours=1))))
        await broker.schedules.ask(Pause("hourly"))

    in_file(url, fill)
    return url


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["schedules", *arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def state_of(name: str) -> str:
    (state,) = [row["state"] for row in json.loads(run("--json")) if row["name"] == name]
    return str(state)


@pytest.mark.usefixtures("url")
def test_the_bare_word_lists_them() -> None:
    assert run() == run("list")
    heading, digest, hourly, nightly = run().splitlines()
    assert heading.split() == ["name", "when", "next", "last", "missed", "skipped", "state"]
    assert "every day" in digest
    assert digest.endswith("active")
    assert hourly.split()[0] == "hourly"
    assert hourly.endswith("paused")
    assert hourly.split()[3:5] == ["-", "-"], "none is to be expected"
    assert "30 2 * * * (Europe/Berlin), up to 10 minutes later" in nightly


@pytest.mark.usefixtures("url")
def test_programs_get_all_of_it() -> None:
    digest, _, nightly = json.loads(run("list", "--json"))
    assert (digest["application"], nightly["application"]) == (None, "shop:app")
    assert (digest["task"], digest["queue"], digest["body"]) == ("digest", "mail", '{"args":[42]}')
    assert (nightly["jitter"], nightly["catch_up"], nightly["grace"], nightly["overlap"]) == (
        600,
        "latest",
        None,
        "skip",
    )
    assert digest["next"].endswith("T00:00:00Z")
    assert digest["last"] is None


def test_what_does_not_go_on_says_why(url: str) -> None:
    """The reason of a pause that nobody asked for, and the application that has no worker."""

    async def change(broker: Broker) -> None:
        nightly, *_ = [row for row in await broker.schedules.read() if row.name == "nightly"]
        rows = [
            msgspec.structs.replace(nightly, declared=time.time() - 3_600),
            ScheduleRow(schedule("broken", every(days=1)), 0.0, paused=True, problem=f"tz is gone{EVIL}"),
        ]
        await broker._writer.do(lambda store: [store.schedules._write(row) for row in rows])  # type: ignore[attr-defined]

    in_file(url, change)
    said = run()
    assert r"paused: tz is gone\x1b]0;owned\x07" in said
    assert "resting: no worker of shop:app is there." in said
    assert state_of("nightly") == "resting"


def test_an_empty_broker_says_so_and_makes_no_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/none.db"
    assert "No schedules in" in run("--url", url)
    assert json.loads(run("--json", "--url", url)) == []
    with pytest.raises(ScheduleNotFound, match=r"none\.db"):
        run("pause", "x", "--url", url)
    assert not (tmp_path / "none.db").exists()


@pytest.mark.usefixtures("url")
def test_the_next_instants_in_both_zones() -> None:
    heading, *lines = run("next", "nightly", "--count", "400").splitlines()
    assert heading.split() == ["Europe/Berlin", "UTC", "due"]
    assert len(lines) == 400
    assert any("02:30:00 CET" in line and "T01:30:00Z" in line for line in lines)
    assert any("02:30:00 CEST" in line and "T00:30:00Z" in line for line in lines)
    assert any("03:00:00 CEST" in line and "T01:00:00Z" in line for line in lines), "the day with a gap"
    assert len(run("next", "digest:42").splitlines()) == 6


@pytest.mark.usefixtures("url")
def test_the_next_instants_of_what_is_paused() -> None:
    said = run("next", "hourly", "--count", "1")
    assert "It is paused, so nothing is enqueued then." in said


@pytest.mark.usefixtures("url")
def test_pause_and_resume() -> None:
    assert run("pause", "nightly", "digest:42") == "schedule 'nightly' is paused\nschedule 'digest:42' is paused\n"
    assert (state_of("nightly"), state_of("digest:42")) == ("paused", "paused")
    assert run("resume", "nightly") == "schedule 'nightly' goes on\n"
    assert state_of("nightly") == "active"


@pytest.mark.usefixtures("url")
def test_a_trigger_prints_the_task() -> None:
    id_ = run("trigger", "nightly").strip()
    assert id_.startswith("nightly@")
    result = CliRunner().invoke(cli, ["status", id_, "--json"], catch_exceptions=False)
    assert json.loads(result.output)["state"] == "queued"


@pytest.mark.usefixtures("url")
def test_only_data_is_removed() -> None:
    assert run("remove", "digest:42") == "schedule 'digest:42' is removed\n"
    with pytest.raises(ConfigurationError, match="is in the code of 'shop:app'"):
        run("remove", "nightly")
    assert [row["name"] for row in json.loads(run("--json"))] == ["hourly", "nightly"]


@pytest.mark.usefixtures("url")
def test_a_misspelt_name_changes_nothing() -> None:
    with pytest.raises(ScheduleNotFound, match=r"'nigtly' does not exist; did you mean 'nightly'\? \(looked in"):
        run("pause", "digest:42", "nigtly")
    assert state_of("digest:42") == "active"
    with pytest.raises(ScheduleNotFound, match="`leveret schedules` shows those that do"):
        run("next", "qqqqqq")


@pytest.mark.usefixtures("url")
def test_a_misspelt_command_is_guessed() -> None:
    assert "did you mean 'pause'?" in run("pasue", "nightly", code=2)
    assert "0 is not in the range" in run("next", "nightly", "--count", "0", code=2)


@pytest.mark.usefixtures("url")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["schedules", "pa"], ["pause"]),
        (["schedules", "pause", ""], ["digest:42", "hourly", "nightly"]),
        (["schedules", "pause", "nightly", ""], ["digest:42", "hourly"]),
        (["schedules", "next", "ni"], ["nightly"]),
        (["schedules", "next", "--url", "sqlite:////absent/x.db", ""], []),
    ],
)
def test_a_shell_completes(words: list[str], expected: list[str]) -> None:
    complete = BashComplete(cli, {}, "leveret", "_LEVERET_COMPLETE")
    assert [item.value for item in complete.get_completions(words[:-1], words[-1])] == expected
