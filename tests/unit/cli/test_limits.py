"""``leveret limits``: what it shows and does, on a file."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from leveret import ConfigurationError, LimitNotFound, Rate
from leveret.brokers import connect
from leveret.cli import cli
from leveret.model import LIMITS, DeclareLimits, Envelope, LimitRule, Queue, RestLimit, SetLimit

if TYPE_CHECKING:
    from pathlib import Path

    from leveret.brokers import Broker

EVIL = "\x1b]0;owned\x07"
UNTIL = time.time() + 500


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file with a limit of a queue, one that two tasks wait for, one with keys that rest, and an evil one."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    url = f"sqlite:///{tmp_path}/x.db"
    monkeypatch.setenv("LEVERET_URL", url)

    async def fill(broker: Broker) -> None:
        await broker.declare([Queue("mail")])
        rules = {
            "stripe": LimitRule(20, Rate(100, per=60)),
            "tenants": LimitRule(3),
            "queue:render": LimitRule(40),
            f"{EVIL}": LimitRule(),
        }
        await broker.limits.ask(DeclareLimits(1.0, rules, ["mail"]))
        await broker.limits.ask(SetLimit("stripe", LimitRule(5, Rate(100, per=60))))
        for key in ("acme", "other"):
            await broker.limits.ask(RestLimit("tenants", key, UNTIL))
        headers = {LIMITS: '[["stripe",""]]'}
        await broker.publish([Envelope(id_, "mail", "send", b"{}", headers=headers) for id_ in "ab"])
        await broker.close()

    asyncio.run(fill(connect(url)))
    return url


def leveret(*arguments: str, fails: bool = False) -> str:
    result = CliRunner().invoke(cli, arguments)
    assert (result.exit_code != 0) is fails, result.output
    if fails and isinstance(result.exception, (ConfigurationError, LimitNotFound)):
        return str(result.exception)
    return result.output


def listed() -> dict[str, Any]:
    return {one["name"]: one for one in json.loads(leveret("limits", "--json"))}


def test_a_bare_command_lists_them(url: str) -> None:
    del url
    shown = leveret("limits")
    assert shown == leveret("limits", "list")
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in shown.splitlines()}
    assert lines["name"] == "name allows admitted waiting keys state"
    assert lines["stripe"] == "stripe 5 at once, 100/minute (code: 20 at once, 100/minute) 0 2 1 active"
    assert lines["queue:render"] == "queue:render 40 at once 0 0 0 active"
    assert lines["tenants"].startswith("tenants 3 at once 0 0 0 resting, 2 keys rest, until 20")
    assert "\x1b" not in shown
    assert "limited" in leveret("queues")


def test_programs_get_all_of_it(url: str) -> None:
    del url
    found = listed()
    assert found["stripe"] == {
        "name": "stripe",
        "concurrency": 5,
        "rate": {"count": 100, "per": 60.0, "burst": 5},
        "code": {"concurrency": 20, "rate": {"count": 100, "per": 60.0, "burst": 5}},
        "changed": True,
        "state": "active",
        "resting": {},
        "admitted": 0,
        "waiting": 2,
        "keys": 1,
    }
    assert sorted(found["tenants"]["resting"]) == ["acme", "other"]


def test_a_limit_is_set_and_is_as_in_the_code_again(url: str) -> None:
    del url
    assert leveret("limits", "set", "stripe", "--concurrency", "7") == (
        "limit 'stripe' allows: 7 at once, 100/minute\n"
    )
    assert leveret("limits", "set", "stripe", "--rate", "5/10s", "--burst", "2") == (
        "limit 'stripe' allows: 7 at once, 5/10 seconds\n"
    )
    assert listed()["stripe"]["rate"] == {"count": 5, "per": 10.0, "burst": 2}
    assert leveret("limits", "set", "stripe", "--concurrency", "none", "--rate", "none") == (
        "limit 'stripe' allows: no limit\n"
    )
    assert leveret("limits", "set", "stripe", "--code") == "limit 'stripe' allows: 20 at once, 100/minute\n"
    assert listed()["stripe"]["changed"] is False


@pytest.mark.parametrize(
    ("rate", "per"),
    [("100/60", 60), ("100/m", 60), ("100/minute", 60), ("1/1h30m", 5_400), ("5 / s", 1), ("2/day", 86_400)],
)
def test_a_rate_is_written_in_many_ways(url: str, rate: str, per: float) -> None:
    del url
    leveret("limits", "set", "tenants", "--rate", rate)
    assert listed()["tenants"]["rate"]["per"] == per


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("set", "stripe"), "say --concurrency, --rate or both, or else --code"),
        (("set", "stripe", "--code", "--concurrency", "5"), "or else --code"),
        (("set", "stripe", "--concurrency", "5", "--burst", "2"), "--burst goes with --rate"),
        (("set", "stripe", "--concurrency", "0"), "concurrency is 0; it must be a whole number, at least 1"),
        (("set", "stripe", "--concurrency", "few"), "'few' is no whole number"),
        (("set", "stripe", "--rate", "100"), "'100' is no rate: write 100/60, 100/minute"),
        (("set", "stripe", "--rate", "100/soon"), "is no rate"),
        (("set", "stripe", "--rate", "0/s"), "Rate: count is 0"),
        (("set", "strpe", "--code"), "limit 'strpe' does not exist; did you mean 'stripe'"),
        (
            ("pause", "stripe", "nosuch"),
            "limit 'nosuch' does not exist; `leveret limits` shows those that do",
        ),
        (("stop", "stripe"), "No such command 'stop'"),
    ],
)
def test_what_is_wrong_is_named(url: str, arguments: tuple[str, ...], why: str) -> None:
    del url
    assert why in leveret("limits", *arguments, fails=True)
    assert listed()["stripe"]["state"] == "active"
    assert listed()["stripe"]["concurrency"] == 5


def test_limits_are_paused_resumed_and_removed(url: str) -> None:
    del url
    assert leveret("limits", "pause", "stripe", "tenants") == "limit 'stripe' is paused\nlimit 'tenants' is paused\n"
    assert {listed()[name]["state"] for name in ("stripe", "tenants")} == {"paused"}
    assert "paused, 2 keys rest, until" in leveret("limits")
    assert leveret("limits", "resume", "tenants") == "limit 'tenants' goes on\n"
    assert (listed()["tenants"]["state"], listed()["tenants"]["resting"]) == ("active", {})
    assert leveret("limits", "remove", "stripe") == "limit 'stripe' is removed\n"
    assert "stripe" not in listed()


def test_names_are_completed(url: str) -> None:
    del url
    completed = BashComplete(cli, {}, "leveret", "_").get_completions(["limits", "pause", "stripe"], "")
    assert "tenants" in [one.value for one in completed]
    assert "stripe" not in [one.value for one in completed]


def test_without_limits_it_says_where_they_come_from(tmp_path: Path) -> None:
    shown = leveret("limits", "--url", f"sqlite:///{tmp_path}/none.db")
    assert "A worker of the application brings those of its code." in shown
