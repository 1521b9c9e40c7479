"""What commands that ask the broker print, and when they give up."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from leveret.brokers import connect
from leveret.cli import cli
from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.model import Envelope
from tests.support.dashboard import bury
from tests.support.nodes import free_ports

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "\x1b]0;owned\x07\x9b2J\u202e"


def dead(path: Path) -> str:
    """The URL of a broker with one dead task, whose id is 1."""
    url = f"sqlite:///{path / 'leveret.db'}"

    async def fill() -> None:
        broker = connect(url)
        await bury(broker, [Envelope("1", "work", f"say{EVIL}", b"{}", enqueued_at=time.time())], f"one\ntwo{EVIL}")
        await broker.close()

    asyncio.run(fill())
    return url


def test_a_status_that_is_followed_is_told_once(tmp_path: Path) -> None:
    url = dead(tmp_path)
    result = CliRunner().invoke(cli, ["status", "1", "--follow", "--json", "--url", url], catch_exceptions=False)
    (line,) = result.output.splitlines()
    assert json.loads(line)["state"] == "dead"


def test_a_terminal_is_told_nothing_by_a_status(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["status", "1", "--url", dead(tmp_path)], catch_exceptions=False)
    first, second = result.output.splitlines()
    assert r"say\x1b]0;owned\x07\x9b2J\u202e" in first
    assert second.strip() == r"one\ntwo\x1b]0;owned\x07\x9b2J\u202e"


def test_one_look_at_a_broker_that_is_away_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.cli.options.TIMEOUT", 0.5)
    url = f"amqp://guest:guest@127.0.0.1:{free_ports(1)[0]}/"
    with pytest.raises(BrokerUnavailable):
        CliRunner().invoke(cli, ["top", "--once", "--url", url], catch_exceptions=False)


def test_a_dashboard_of_no_broker_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.dashboard.serving.serve", lambda *_: pytest.fail("it was served"))
    with pytest.raises(ConfigurationError, match=r"'foo://bar' is not a broker's URL"):
        CliRunner().invoke(cli, ["dashboard", "--url", "foo://bar"], catch_exceptions=False)
