"""What entries of the claims log add up to."""

from __future__ import annotations

import random
import tracemalloc

import msgspec
import pytest

from leveret.brokers.rabbitmq.coordination.claim_entries import (
    Adopted,
    Emptied,
    Entry,
    History,
    Holders,
    NewClaim,
    Row,
    Snapshot,
    encode,
    entry_of,
)
from leveret.model import Envelope, new_id

TASK = Envelope("1", "work", "say", b"\xff body", headers={"a": 1})
RAW = msgspec.Raw(msgspec.json.encode(TASK))


def claim(key: str, id_: str, *, queue: str = "work", until: float = 100.0) -> NewClaim:
    return NewClaim(key, id_, queue, until, RAW)


def holders(*entries: Entry) -> Holders:
    """As a reader has it, who gets them as bytes."""
    table = Holders()
    for now, entry in enumerate(entries):
        read = entry_of(encode(entry))
        assert read is not None
        table.apply(read, float(now))
    return table


def ids(table: Holders) -> dict[str, str]:
    return {key: one.id for key, one in table.items()}


def test_the_first_live_claim_wins() -> None:
    table = holders(
        Entry(by="a", at=1.0, claims=[claim("k", "1"), claim("l", "2")]),
        Entry(by="b", at=2.0, claims=[claim("k", "3"), claim("m", "4"), claim("m", "5")]),
    )
    assert ids(table) == {"k": "1", "l": "2", "m": "4"}


def test_only_its_own_end_frees_a_key() -> None:
    first = Entry(by="a", at=1.0, claims=[claim("k", "1")])
    assert ids(holders(first, Entry(freed=[("k", "2"), ("l", "1")]))) == {"k": "1"}
    assert ids(holders(first, Entry(freed=[("k", "1")], claims=[claim("k", "2")]))) == {"k": "2"}
    assert ids(holders(first, Entry(freed=[("k", "")]))) == {}
    assert ids(holders(first, Entry(cancelled=["1"]))) == {}


def test_a_claim_that_is_too_old_is_void() -> None:
    """By the writers' clocks, so all readers agree."""
    first = Entry(by="a", at=1.0, claims=[claim("k", "1", until=50.0)])
    assert ids(holders(first, Entry(by="b", at=49.0, claims=[claim("k", "2")]))) == {"k": "1"}
    assert ids(holders(first, Entry(by="b", at=51.0, claims=[claim("k", "2")]))) == {"k": "2"}


def test_what_waited_in_an_emptied_queue_has_ended() -> None:
    table = holders(
        Entry(by="a", at=1.0, claims=[claim("k", "1"), claim("l", "2"), claim("m", "3", queue="other")]),
        Entry(emptied=[Emptied("work", ["2"])]),
    )
    assert ids(table) == {"l": "2", "m": "3"}


def test_one_program_completes_what_another_has_left() -> None:
    first = Entry(by="a", at=1.0, claims=[claim("k", "1")])
    table = holders(
        first, Entry(by="b", adopted=[Adopted("k", "1", "a")]), Entry(by="c", adopted=[Adopted("k", "1", "a")])
    )
    held = table.get("k")
    waiting = table.pending("k")
    assert held is not None
    assert waiting is not None
    assert held.owner == "b"
    assert waiting.envelope() == TASK
    assert [key for key, _ in table.overdue(1.5)] == ["k"]
    assert list(table.overdue(0.5)) == []


def test_what_is_stored_is_nobodys_to_complete() -> None:
    first = Entry(by="a", at=1.0, claims=[claim("k", "1")])
    table = holders(
        first, Entry(by="a", stored=[("k", "2")]), Entry(stored=[("k", "1")]), Entry(adopted=[Adopted("k", "1", "a")])
    )
    held = table.get("k")
    assert held is not None
    assert (held.owner, table.pending("k"), table.overdue(99.0)) == ("a", None, [])


def test_a_claim_may_be_sent_twice() -> None:
    first = Entry(by="a", at=1.0, claims=[claim("k", "1")])
    table = holders(first, Entry(stored=[("k", "1")]), first)
    assert ids(table) == {"k": "1"}
    assert table.overdue(99.0) == []


def test_what_makes_no_sense_is_not_read() -> None:
    for body in (
        b"",
        b"[]",
        b"\xff",
        b'{"v": 2}',
        b'{"v": 1, "claims": [["k", "1"]]}',
        b'{"v": 1, "freed": [["k"]]}',
        encode(Entry(claims=[claim("", "1")])),
        encode(Entry(claims=[claim("k", "1", queue="q" * 300)])),
    ):
        assert entry_of(body) is None
    forged = NewClaim("k", "1", "work", 9.0, msgspec.Raw(b'["another", "work", "say", ""]'))
    waiting = holders(Entry(claims=[forged])).pending("k")
    assert waiting is not None
    assert waiting.envelope() is None


def some_entry(choice: random.Random, number: int) -> Entry:
    """Anything that programs do with a few keys."""
    key, id_ = f"k{choice.randrange(6)}", f"{choice.randrange(40)}"
    kinds = (
        Entry(by="a", claims=[claim(key, f"{number}", until=number + choice.choice([3.0, 1_000.0]))]),
        Entry(by="b", claims=[claim(key, f"{number}", queue="other")], freed=[(key, id_)]),
        Entry(freed=[(key, id_)]),
        Entry(freed=[(key, "")]),
        Entry(by="a", stored=[(key, id_)]),
        Entry(by="b", adopted=[Adopted(key, id_, "a")]),
        Entry(cancelled=[id_]),
        Entry(emptied=[Emptied("other", [id_])]),
    )
    return msgspec.structs.replace(choice.choice(kinds), at=float(number), n=number)


def summary(history: History) -> dict[str, tuple[object, ...]]:
    found = history.holders
    return {
        key: (one.id, one.queue, one.until, one.owner, waiting and waiting.task)
        for key, one in found.items()
        for waiting in [found.pending(key)]
    }


@pytest.mark.parametrize(
    "id_", ["01a22e58fc44755613164fd7dd2e5371", "0" * 32, "7", "0x10", "A" * 32, "a" * 33, " 1_0", "order-7"]
)
def test_an_id_is_what_it_was(id_: str) -> None:
    assert ids(holders(Entry(by="a", claims=[claim("k", id_)]))) == {"k": id_}


def test_what_is_kept_of_many_keys_fits_thirty_megabytes_for_a_hundred_thousand() -> None:
    """Also while a snapshot is read: its parts are not kept beside what they come to."""
    keys = 20_000
    rows = [Row("a", NewClaim(f"sync:{key}", new_id(), "work", 9.0 + key, msgspec.Raw(b"null"))) for key in range(keys)]
    parts = [rows[start : start + 1_000] for start in range(0, keys, 1_000)]
    bodies = [encode(Entry(snapshot=Snapshot(4, "t", n, len(parts), part))) for n, part in enumerate(parts)]
    del rows, parts
    tracemalloc.start()
    try:
        history = History(lambda _: None)
        history.begin(5)
        for offset, body in enumerate(bodies, 5):
            entry = entry_of(body)
            assert entry is not None
            history.read(offset, entry, 0.0)
        del entry
        assert history.is_complete
        assert len(history.holders) == keys
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak / keys < 300


def test_who_begins_behind_a_snapshot_knows_what_all_know() -> None:
    """Wherever its parts stand among the other entries, and however many snapshots there are."""
    for seed in range(200):
        choice = random.Random(seed)
        applied: list[int] = []
        whole, log = History(lambda _: None), list[bytes]()
        later: list[bytes] = []

        def append(entry: Entry, log: list[bytes] = log, whole: History = whole) -> None:
            read = entry_of(encode(entry))
            assert read is not None
            whole.read(len(log), read, 0.0)
            log.append(encode(entry))

        for number in range(choice.randrange(20, 120)):
            append(some_entry(choice, number))
            if later and choice.random() < 0.4:
                append(msgspec.json.decode(later.pop(0), type=Entry))
            elif not later and choice.random() < 0.1:
                rows = list(whole.holders.rows(0.0))
                parts = [rows[:2], rows[2:]]
                token = f"{number}"
                later = [
                    encode(Entry(n=number, snapshot=Snapshot(len(log) - 1, token, place, 2, part)))
                    for place, part in enumerate(parts)
                ]
        for part in later:
            append(msgspec.json.decode(part, type=Entry))
        if not whole.base:
            continue
        fresh = History(lambda entry, applied=applied: applied.append(entry.n))  # type: ignore[misc]
        fresh.begin(whole.base)
        for offset in range(whole.base, len(log)):
            read = entry_of(log[offset])
            assert read is not None
            fresh.read(offset, read, 0.0)
        assert fresh.is_complete
        assert summary(fresh) == summary(whole)
        assert fresh.base == whole.base
        assert len(applied) == len(log) - whole.base


def test_a_snapshot_that_never_comes_is_seen() -> None:
    history = History(lambda _: None)
    history.begin(5)
    history.read(5, Entry(claims=[claim("k", "1")]), 0.0)
    history.read(6, Entry(snapshot=Snapshot(4, "t", 0, 2, [])), 0.0)
    history.read(7, Entry(snapshot=Snapshot(3, "u", 0, 1, [])), 0.0)
    assert not history.is_complete
