"""A worker's log as people look at it: what tasks log themselves, how they end, and why they failed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import wait_until
from tests.support.workers import Program, leveret

if TYPE_CHECKING:
    from pathlib import Path

APP = """
import logging
import os

from leveret import App
{set_up}
app = App()
shop = logging.getLogger("shop")

@app.task
def sell(what: str) -> None:
    logging.debug("a detail of %s", what)
    logging.info("sold %s", what)
    shop.warning("few are left")

@app.task(max_attempts=1)
async def fail() -> None:
    logging.getLogger("shop").info("before it fails")
    raise ValueError("no\\n2026-01-31 12:00:00,000 INFO    forged")

@app.task(acknowledge="before")
def fail_once() -> None:
    raise KeyError("once")
"""
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


def run(
    tmp_path: Path, *options: str, set_up: str = "", tasks: tuple[tuple[str, ...], ...] = (("sell", "tea"),)
) -> str:
    """What a worker says until all of the tasks have run."""
    (tmp_path / "shop.py").write_text(APP.format(set_up=set_up))
    environment = {"PYTHONPATH": str(tmp_path), "LEVERET_URL": f"sqlite:///{tmp_path}/x.db"}
    for task in tasks:
        leveret("enqueue", "shop:app", *task, environment=environment)
    arguments = ["-m", "leveret", "worker", "shop:app", "--concurrency", "1", *options]
    with Program(arguments, tmp_path / "log", environment, folder=tmp_path) as worker:

        def over() -> bool:
            stats = json.loads(leveret("queues", "--json", environment=environment))
            return not any(one["ready"] + one["running"] for one in stats)

        wait_until(over, f"all have run: {worker.output}")
        worker.signal(15)
        worker.exit_code()
        return worker.output


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_a_task_logs_is_there_with_its_name(tmp_path: Path, form: str) -> None:
    said = run(tmp_path, "--log-format", form)
    expected = [
        ("INFO", "sold tea", True),
        ("WARNING", "few are left", True),
        ("INFO", r"sell [0-9a-f]{32}: done in \d\.\d{3} s", False),
    ]
    if form == "json":
        lines = [json.loads(line) for line in said.splitlines()]
        for level, message, _ in expected:
            (line,) = [one for one in lines if one["level"] == level and re.fullmatch(message, one["message"])]
            assert line["task_name"] == "sell"
            assert line["task_queue"] == "default"
    else:
        for level, message, prefixed in expected:
            who = "sell [0-9a-f]{32}: " if prefixed else ""
            assert re.search(rf"^{TIME} {level:<7} {who}{message}$", said, re.MULTILINE), said
    assert "a detail" not in said


@pytest.mark.parametrize("form", ["text", "json"])
def test_why_a_task_failed_is_in_the_log(tmp_path: Path, form: str) -> None:
    said = run(tmp_path, "--log-format", form, tasks=(("fail",), ("fail_once",)))
    if form == "json":
        lines = [json.loads(line) for line in said.splitlines()]
        dead, once = (
            next(one for one in lines if one["level"] == "ERROR" and word in one["message"])
            for word in ("ValueError", "KeyError")
        )
        assert "in fail\n" in dead["exception"]
        assert "in fail_once\n" in once["exception"]
        return
    assert re.search(
        rf"^{TIME} ERROR   fail [0-9a-f]+: dead after \d\.\d+ s: ValueError: no\\n2026", said, re.MULTILINE
    )
    assert re.search(rf'^  Traceback.*\n    File "{tmp_path}/shop.py", line \d+, in fail\n', said, re.MULTILINE), said
    assert re.search(r"^    File .*, in fail_once\n", said, re.MULTILINE)
    assert not re.search(rf"^{TIME} INFO    forged", said, re.MULTILINE)  # indented: no line of its own


@pytest.mark.parametrize(
    ("level", "shown"), [("DEBUG", 3), ("INFO", 2), ("WARNING", 1), ("ERROR", 0), ("error", 0), ("CRITICAL", 0)]
)
@pytest.mark.parametrize(
    "set_up",
    ["", "logging.warning('said on import')", "logging.getLogger('shop').setLevel('DEBUG')",
     "logging.basicConfig(level='INFO', format='%(levelname)s mine %(message)s')"],
    ids=["none", "accidental", "own level", "own handler"],
)  # fmt: skip
def test_the_level_is_what_it_says(tmp_path: Path, level: str, shown: int, set_up: str) -> None:
    said = run(tmp_path, "--log-level", level, set_up=set_up)
    lines = ["few are left", "sold tea", "a detail of tea"]
    assert [line for line in lines if line in said] == lines[:shown]
    assert ("done in" in said) == (shown > 1)


def test_an_application_that_sets_logging_up_keeps_it(tmp_path: Path) -> None:
    set_up = "logging.basicConfig(level='DEBUG', format='%(levelname)s mine %(message)s')"
    assert "DEBUG mine a detail of tea\n" in run(tmp_path, set_up=set_up)


@pytest.mark.parametrize(
    ("module", "traceback", "line"),
    [
        (
            "import os\n\ndef f():\n    return 1 / 0\n\nf()\n",
            "line 6, in <module>",
            "ZeroDivisionError: division by zero",
        ),
        ("import os\nimport absent_module\n", "line 2, in <module>", "No module named 'absent_module'"),
        ("x = (\n", "line 1", "SyntaxError: '(' was never closed"),
        ("import below\n", 'below.py", line 1', "ValueError: deep"),
    ],
)
@pytest.mark.parametrize("command", [["worker", "broken:app"], ["enqueue", "broken.py:app", "x"]], ids=str)
def test_an_application_that_cannot_be_imported_shows_its_line(
    tmp_path: Path, module: str, traceback: str, line: str, command: list[str]
) -> None:
    (tmp_path / "broken.py").write_text(module)
    (tmp_path / "below.py").write_text("raise ValueError('deep')\n")
    command = [command[0], f"{tmp_path}/{command[1]}" if ".py" in command[1] else command[1], *command[2:]]
    said = leveret(*command, environment={"PYTHONPATH": str(tmp_path)}, fails=True)
    assert traceback in said
    *shown, last = said.splitlines()
    assert last.startswith("leveret: importing ")
    assert line in last
    assert re.search(r"\(.*\.py, line \d+\)$", last)
    assert not [one for one in shown if "importlib" in one or "leveret/app.py" in one]
