"""Log records: what they say of a task, and as JSON."""

from __future__ import annotations

import json
import logging

import pytest

from leveret.model import Cancelled, DeadLettered, Envelope, Outcome, Retrying, Succeeded
from leveret.observe.events import TaskBlocks, TaskSettled, write_log
from leveret.observe.logs import JsonFormatter, TaskFields, TextFormatter
from tests.support.bench import Bench

log = logging.getLogger("shop")


class Kept(logging.Handler):
    """Keeps the records, filtered as a user's handler does it."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(TaskFields())
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def lines(records: list[logging.LogRecord]) -> list[dict[str, object]]:
    return [json.loads(JsonFormatter().format(record)) for record in records]


async def test_what_a_task_logs_says_which_task_it_was(caplog: pytest.LogCaptureFixture) -> None:
    bench, kept = Bench(), Kept()

    @bench.app.task(queue="work")
    async def in_coroutine(text: str) -> None:
        log.warning("hello %s", text)

    @bench.app.task(queue="work")
    def in_thread(text: str) -> None:
        log.warning("hello %s", text)

    log.addHandler(kept)
    try:
        async with bench.working():
            await bench.put("in_coroutine", "a")
            await bench.wait_until_settled(1)
            await bench.put("in_thread", "b")
            settled = await bench.wait_until_settled(2)
        log.warning("outside")
    finally:
        log.removeHandler(kept)
    first, second, outside = lines(kept.records)
    for line, event, name in ((first, settled[0], "in_coroutine"), (second, settled[1], "in_thread")):
        del line["time"]
        assert line == {
            "level": "WARNING",
            "logger": "shop",
            "message": f"hello {'a' if name == 'in_coroutine' else 'b'}",
            "task_id": event.envelope.id,
            "task_name": name,
            "task_queue": "work",
            "task_attempt": 1,
        }
    assert set(outside) == {"time", "level", "logger", "message"}
    plain = logging.Formatter("%(task_name)s %(message)s")
    assert [plain.format(record) for record in kept.records][1:] == ["in_thread hello b", "None outside"]
    del caplog


@pytest.mark.parametrize("task", ["say", None])
def test_the_workers_own_records_have_the_fields(caplog: pytest.LogCaptureFixture, task: str | None) -> None:
    envelope = Envelope("id-1", "work", task, b"", attempt=3)
    with caplog.at_level(logging.DEBUG, "leveret.worker"):
        for event in (
            TaskSettled(envelope, Succeeded()),
            TaskSettled(envelope, DeadLettered("no")),
            TaskSettled(envelope, Succeeded(), kept=False),
            TaskBlocks(envelope, 1.0, "here"),
        ):
            write_log(event)
    for line in lines(caplog.records):
        name = {} if task is None else {"task_name": task}
        assert {key: value for key, value in line.items() if key.startswith("task_")} == {
            "task_id": "id-1",
            **name,
            "task_queue": "work",
            "task_attempt": 3,
        }


@pytest.mark.parametrize(
    "outcome", [DeadLettered("a\n2026 INFO forged\x1b[2J"), Retrying("b\r\n\x9b2J"), Cancelled("c\nd")], ids=str
)
@pytest.mark.parametrize("at_most_once", [True, False])
def test_nothing_in_a_message_makes_a_line_of_its_own(
    caplog: pytest.LogCaptureFixture, outcome: Outcome, *, at_most_once: bool
) -> None:
    envelope = Envelope("id\n\x1b]0;x\x07", "work", "say\nforged\x1b[31m", b"")
    with caplog.at_level(logging.DEBUG, "leveret.worker"):
        write_log(TaskSettled(envelope, outcome, at_most_once=at_most_once))
        write_log(TaskSettled(envelope, outcome, kept=False))
    assert len(caplog.messages) == 2
    assert all(message.isprintable() for message in caplog.messages)
    assert all(r"say\nforged\x1b[31m" in message for message in caplog.messages)


def test_a_line_of_json_whatever_is_logged() -> None:
    record = logging.LogRecord("a\nb", logging.ERROR, "", 1, "%s\n\udc80\x00", ("é",), None)
    error = ValueError("\udc80")
    record.exc_info = (ValueError, error, None)
    text = JsonFormatter().format(record)
    assert text.isascii()
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "é\n\udc80\x00"
    assert line["exception"] == "ValueError: \udc80"
    assert line["time"].endswith("+00:00")


EVIL = "a\nb\rc\r\n2026-01-01 00:00:00,000 INFO forged\x1b[2J\x07\x7f\x85\x9b\u202e\u2066\u2028\u2029\ud800"


def test_nothing_but_a_record_begins_a_line() -> None:
    record = log.makeRecord("shop", logging.WARNING, "", 0, "task %s failed", (EVIL,), None)
    error = ValueError(EVIL)
    error.add_note(EVIL)
    record.exc_info = (ValueError, error, None)
    text, encoded = TextFormatter().format(record), JsonFormatter().format(record)
    first, *others = text.splitlines()
    assert first.endswith("WARNING task a")
    assert len(others) > 5  # a traceback stays readable
    assert all(line.startswith("  ") for line in others)
    assert text.replace("\n", "").isprintable()
    assert encoded.isprintable()
    assert json.loads(encoded)["message"] == f"task {EVIL} failed"
