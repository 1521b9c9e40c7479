"""Which dead letters ``leveret dead`` means."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from leveret.brokers.memory import MemoryBroker
from leveret.cli.dead import command
from leveret.model import DeadLetter, Envelope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Select


class Letters(MemoryBroker):
    """Has these letters, as a foreign producer may have left them."""

    def __init__(self, *letters: DeadLetter) -> None:
        super().__init__()
        self.letters = letters
        self.discarded: list[tuple[str, str]] = []

    async def dead_letters(self, queue: str, *, limit: int, select: Select | None = None) -> Sequence[DeadLetter]:
        found = [one for one in self.letters if one.envelope.queue == queue][:limit]
        return found if select is None else [one for one in map(select, found) if one is not None]

    async def discard(self, queue: str, ids: Sequence[str]) -> Sequence[str]:
        self.discarded += [(queue, id_) for id_ in ids]
        return ids


def run(monkeypatch: pytest.MonkeyPatch, broker: MemoryBroker, *arguments: str) -> str:
    monkeypatch.setattr("leveret.cli.dead.broker_and_queues", lambda *_: (broker, ()))
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def letter(id_: str, died_at: float | None, reason: str = "ValueError") -> DeadLetter:
    return DeadLetter(Envelope(id_, "work", "say", b"{}"), reason, "", died_at)


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


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_a_reason_is_shown_whole_however_narrow_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    envelope = Envelope("0" * 32, "work", "its_own_decision", b"{}", attempt=12)
    shown = run(monkeypatch, Letters(DeadLetter(envelope, "there is no order 0", "", 1.0)), "list", "work")
    assert "its_own_decision" in shown
    assert "there is no order 0" in shown
    assert max(map(len, shown.splitlines())) <= int(columns)
