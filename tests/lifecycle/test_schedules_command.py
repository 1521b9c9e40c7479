"""``leveret schedules`` beside a real worker, on each broker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support import schedules_app
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(schedules_app.__file__)}:app"


def shown(url: str) -> dict[str, Any]:
    """What is shown of the schedule of the application's code; nothing if it is not there."""
    rows = json.loads(leveret("schedules", "--json", "--url", url))
    return next((row for row in rows if row["name"] == "tick"), {})


def test_schedules_are_seen_and_steered(place: Place, ledger: Ledger) -> None:
    assert shown(place.url) == {}
    assert "does not exist" in leveret("schedules", "pause", "tick", "--url", place.url, fails=True)
    with Worker(place.url, ledger, app=APP).ready():
        ledger.wait_for("tick", 2)
        wait_until(lambda: shown(place.url).get("last"), "its last instant is shown")
        assert shown(place.url)["state"] == "active"
        assert shown(place.url)["application"] == APP
        assert "every second" in leveret("schedules", "list", "--url", place.url)
        assert len(leveret("schedules", "next", "tick", "--count", "3", "--url", place.url).splitlines()) == 4

        assert leveret("schedules", "pause", "tick", "--url", place.url) == "schedule 'tick' is paused\n"
        assert shown(place.url)["state"] == "paused"
        id_ = leveret("schedules", "trigger", "tick", "--url", place.url).strip()
        wait_until(lambda: id_ in ledger.path.read_text(), "the triggered task has run")
        last = shown(place.url)["last"]

        assert "is in the code of" in leveret("schedules", "remove", "tick", "--url", place.url, fails=True)
        assert "did you mean 'tick'?" in leveret("schedules", "resume", "tik", "--url", place.url, fails=True)
        assert shown(place.url)["last"] == last, "it is paused"
        assert leveret("schedules", "resume", "tick", "--url", place.url) == "schedule 'tick' goes on\n"
        wait_until(lambda: shown(place.url)["last"] > last, "it goes on")
