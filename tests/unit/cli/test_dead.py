"""Which dead letters ``leveret dead`` means."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from rich.console import Console

from leveret import App, Queue
from leveret.brokers import connect
from leveret.brokers.memory import MemoryBroker, MemoryQueues, MemoryStatuses, MemoryStore
from leveret.cli import unique
from leveret.cli.dead import command
from leveret.cli.options import Target
from leveret.cli.status import status
from leveret.model import UNIQUE_KEY, DeadLetter, DeadLettered, Envelope, QueueStats, buried
from leveret.testing.bench import Taken, settle_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from leveret.brokers import Select
    from leveret.model import Status


class Letters(MemoryBroker):
    """Has these letters, as a foreign producer may have left them."""

    def __init__(self, *letters: DeadLetter) -> None:
        store = MemoryStore()
        super().__init__(store)
        self.letters = letters
        self.discarded: list[tuple[str, str]] = []
        self.revived: list[tuple[str, str]] = []
        self.queues = LetterQueues(self, store)
        self.dead_letters = Kept(self)


class Kept:
    def __init__(self, broker: Letters) -> None:
        self._broker = broker

    async def read(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        found = [one for one in self._broker.letters if one.envelope.queue == queue][:limit]
        return found if select is None else [one for one in map(select, found) if one is not None]

    async def retry(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        self._broker.revived += [(queue, id_) for id_ in ids]
        return ids

    async def drop(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        self._broker.discarded += [(queue, id_) for id_ in ids]
        return ids


class LetterQueues(MemoryQueues):
    def __init__(self, broker: Letters, store: MemoryStore) -> None:
        super().__init__(store, MemoryStatuses(store, 60.0))
        self._broker = broker

    async def stats(self, queues: Sequence[str] = ()) -> Sequence[QueueStats]:
        del queues
        names = dict.fromkeys(one.envelope.queue for one in self._broker.letters)
        return [QueueStats(name, 0, 0, 1, 0) for name in names]


def run(monkeypatch: pytest.MonkeyPatch, broker: MemoryBroker, *arguments: str) -> str:
    monkeypatch.setattr("leveret.cli.dead.target", lambda *_: Target(broker, (), "memory"))
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def letter(id_: str, died_at: float | None, reason: str = "ValueError") -> DeadLetter:
    return DeadLetter(Envelope(id_, "work", "say", b"{}"), reason, "", died_at)


def test_a_time_of_death_that_is_unknown_is_not_1970(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = letter("a", None), letter("b", 1e9)

    async def statuses(ids: Sequence[str]) -> Sequence[Status]:
        return [buried(one) for one in letters if one.envelope.id in ids]

    def app(*_: object, **__: object) -> App:
        app = App("memory://")
        monkeypatch.setattr(app.client, "statuses", statuses)
        return app

    monkeypatch.setattr("leveret.cli.status.App", app)
    assert "since when is unknown" in CliRunner().invoke(status, ["a"], catch_exceptions=False).output
    assert "since 2001-09-09" in CliRunner().invoke(status, ["b"], catch_exceptions=False).output


def test_an_age_that_is_unknown_is_not_old(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Letters(letter("unknown", None), letter("old", time.time() - 100), letter("new", time.time()))
    assert "1 dead letter of" in run(monkeypatch, broker, "drop", "work", "--older", "50")
    assert broker.discarded == [("work", "old")]
    assert "unknown" not in run(monkeypatch, broker, "list", "work", "--older", "0")


def test_a_terminal_is_told_nothing_by_a_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    envelope = Envelope("1", f"work{evil}", f"say\n{evil}", f"{evil} body".encode())
    broker = Letters(DeadLetter(envelope, f"one\ntwo {evil}", f"Traceback\n  {evil}", None, worker=evil))
    for arguments in (("list", envelope.queue), ("show", envelope.queue, "1")):
        shown = run(monkeypatch, broker, *arguments)
        assert shown.replace("\n", "").isprintable(), arguments
    assert "one\n  two" in shown
    assert r"task: say\n\x1b]0;owned" in shown


def test_no_line_of_a_reason_looks_like_another_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that begins at the margin is one of ours, whatever breaks the lines of a text."""
    breaks = "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"
    forged = "".join(f"oh{end}body: forged{end}  died_at: now" for end in breaks)
    envelope = Envelope("1", "work", f"say{forged}", forged.encode())
    shown = run(monkeypatch, Letters(DeadLetter(envelope, forged, forged, 1.0, worker=forged)), "show", "work", "1")
    names = [line.partition(":")[0] for line in shown.splitlines() if not line.startswith(" ")]
    assert names == [
        *("id", "task", "queue", "attempt", "priority", "reason", "died_at", "worker"),
        *("enqueued_at", "body", "traceback"),
    ]


def test_json_is_the_same_to_a_program_and_harmless_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\x1b]0;owned\x07\x7f\x85\x9b2J\u202e\u2066\u2028\u2029\ufeff\U000e0041 é 🐇"
    broker = Letters(DeadLetter(Envelope("1", "work", evil, evil.encode()), evil, evil, None, worker=evil))
    for arguments in (("list", "work", "--json"), ("show", "work", "1", "--json")):
        shown = run(monkeypatch, broker, *arguments)
        assert shown.replace("\n", "").isprintable(), arguments
        found = json.loads(shown)
        letter = found[0] if isinstance(found, list) else found
        assert [letter[name] for name in ("task", "reason", "body", "traceback", "worker")] == [evil] * 5


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_reason_is_shown_whole_however_narrow_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr("leveret.cli.dead.console", lambda: Console(width=columns, file=sys.stdout))
    envelope = Envelope("0" * 32, "work", "its_own_decision", b"{}", attempt=12)
    shown = run(monkeypatch, Letters(DeadLetter(envelope, "there is no order 0", "", 1.0)), "list", "work")
    head = shown.splitlines()[:2] if columns < 110 else shown.splitlines()[:1]
    assert " ".join(head).split() == ["id", "task", "age", "attempt", "reason"]
    assert "its_own_decision" in shown
    assert "there is no order 0" in shown
    assert max(map(len, shown.splitlines())) <= columns


def test_in_a_narrow_terminal_the_columns_stand_below_their_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.cli.dead.console", lambda: Console(width=80, file=sys.stdout))
    letters = letter("0" * 32, 1.0, "first"), letter("invoice-42", 1.0, "second")
    head, _, first, _, second, _ = run(monkeypatch, Letters(*letters), "list", "work").splitlines()
    assert head.index("task") == first.index("say") == second.index("say")


def test_off_a_terminal_each_letter_is_one_line_below_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says of columns: other programs read it."""
    monkeypatch.setenv("COLUMNS", "80")
    reason = "a reason that is far longer than eighty columns are wide, " * 3
    shown = run(monkeypatch, Letters(letter("0" * 32, 1.0, reason), letter("1" * 32, 1.0, "short")), "list", "work")
    head, first, second = shown.splitlines()
    assert head.split() == ["id", "task", "age", "attempt", "reason"]
    assert first.endswith(reason.strip())
    assert second.endswith("short")


class Queues(Letters):
    """Letters of several queues."""

    def __init__(self) -> None:
        super().__init__(*(DeadLetter(Envelope(id_, q, "say", b"{}"), "E", "", 1.0) for id_, q in IDS))


IDS = (("1", "mail"), ("2", "work"), ("3", "work"))


@pytest.mark.parametrize(
    ("arguments", "revived"),
    [
        (["--all"], [("mail", "1"), ("work", "2"), ("work", "3")]),
        (["work", "--all"], [("work", "2"), ("work", "3")]),
        (["3"], [("work", "3")]),
        (["work", "3"], [("work", "3")]),
        (["1", "3"], [("mail", "1"), ("work", "3")]),
        (["-q", "work", "--task", "say"], [("work", "2"), ("work", "3")]),
        (["-q", "work", "-q", "mail", "--all"], [("work", "2"), ("work", "3"), ("mail", "1")]),
        (["--error", "E"], [("mail", "1"), ("work", "2"), ("work", "3")]),
    ],
)
def test_without_a_queue_all_queues_are_meant(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], revived: list[tuple[str, str]]
) -> None:
    broker = Queues()
    run(monkeypatch, broker, "retry", *arguments)
    assert broker.revived == revived


def test_all_queues_are_listed_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    head, *rows = run(monkeypatch, Queues(), "list").splitlines()
    assert head.split() == ["id", "queue", "task", "age", "attempt", "reason"]
    assert [tuple(row.split()[:2]) for row in rows] == list(IDS)
    assert "id: 3" in run(monkeypatch, Queues(), "show", "3")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retry"], "say which"),
        (["retry", "work"], "say which"),
        (["drop", "wrok", "--all"], "there is no queue and no dead letter 'wrok'; did you mean 'work'?"),
        (["retry", "-q", "wrok", "--all"], "queue 'wrok' does not exist; did you mean 'work'?"),
        (["list", "wrok"], "queue 'wrok' does not exist; did you mean 'work'?"),
        (["show", "9"], "there is no queue and no dead letter '9'"),
        (["show", "work", "9"], "queue 'work' has no dead letter '9'"),
        (["retry", "1", "9"], "not among the dead letters that match: 9"),
    ],
)
def test_a_mistake_changes_nothing_else(monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    broker = Queues()
    monkeypatch.setattr("leveret.cli.dead.target", lambda *_: Target(broker, (), "memory"))
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code != 0
    assert said in result.output + str(result.exception)
    assert broker.revived == ([("mail", "1")] if arguments == ["retry", "1", "9"] else [])
    assert broker.discarded == []


def test_a_letter_whose_unique_key_is_taken_stays_and_is_named(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"

    async def prepare() -> None:
        broker = connect(url, timeout=5)
        await broker.declare([Queue("work")])
        for id_ in ("dead", "alive"):
            await broker.publish([Envelope(id_, "work", "say", b"{}", headers={UNIQUE_KEY: "say:1"})])
            if id_ == "dead":
                async with broker.consume([Queue("work")], credit=1) as consumer:
                    await settle_all(broker, await Taken(consumer).next(), DeadLettered("no"))
        await broker.close()

    asyncio.run(prepare())
    result = CliRunner().invoke(command, ["retry", "work", "dead", "--url", url])
    assert result.exit_code == 1
    assert "0 dead letters of queue 'work' put back" in result.output
    assert "1 were not put back: other tasks have their unique keys" in result.output
    assert "dead" in result.output.splitlines()[-1]
    listed = CliRunner().invoke(unique.command, ["list", "--url", url, "--json"])
    assert json.loads(listed.output) == [{"key": "say:1", "id": "alive", "queue": "work"}]
    assert "of task alive is free" in CliRunner().invoke(unique.command, ["release", "say:1", "--url", url]).output
    assert CliRunner().invoke(unique.command, ["release", "say:1", "--url", url]).exit_code == 1
    assert CliRunner().invoke(command, ["retry", "work", "dead", "--url", url]).exit_code == 0
