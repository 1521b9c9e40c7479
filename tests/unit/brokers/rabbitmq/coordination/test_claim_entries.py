"""What entries of the claims log add up to."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import msgspec
import pytest

from leveret.brokers.rabbitmq.coordination.claim_entries import (
    REMEMBERED,
    Adopted,
    AnotherKey,
    Emptied,
    Entry,
    History,
    Holders,
    NewClaim,
    Row,
    Snapshot,
    Terms,
    Turn,
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
        Entry(
            claims=[of_an_id(f"{number}", kept_until=choice.choice([0.0, number + 9.0]), more=[AnotherKey(key, 99.0)])]
        ),
        Entry(ended=[("id=1", f"{number - 1}", choice.random() < 0.5)]),
        Entry(by="a", claims=[replacing(key, f"{number}", number + 3.0, taken=choice.random() < 0.5)]),
        Entry(by="b", claims=[replacing(key, f"{number}")], taken=[(key, id_)]),
    )
    return msgspec.structs.replace(choice.choice(kinds), at=float(number), n=number)


def summary(history: History) -> dict[str, tuple[object, ...]]:
    found = history.holders
    return {
        key: (
            *(one.id, one.queue, one.until, one.owner, waiting and waiting.task),
            *(one.token, one.kept_until, one.is_dead),
        )
        for key, one in found.items()
        for waiting in [found.pending(key)]
    }


@pytest.mark.parametrize(
    "id_", ["01a22e93d5434d6617ede65883aec238", "0" * 32, "7", "0x10", "A" * 32, "a" * 33, " 1_0", "order-7"]
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


def turns(history: History) -> list[Turn]:
    tasks = itertools.product(range(6), range(120))
    return [history.holders.turn(f"k{key}", f"{id_}", 60.0) for key, id_ in tasks]


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
        assert turns(fresh) == turns(whole)
        assert fresh.base == whole.base
        assert len(applied) == len(log) - whole.base


def test_a_snapshot_that_never_comes_is_seen() -> None:
    history = History(lambda _: None)
    history.begin(5)
    history.read(5, Entry(claims=[claim("k", "1")]), 0.0)
    history.read(6, Entry(snapshot=Snapshot(4, "t", 0, 2, [])), 0.0)
    history.read(7, Entry(snapshot=Snapshot(3, "u", 0, 1, [])), 0.0)
    assert not history.is_complete


def of_an_id(token: str, *, kept_until: float = 0.0, key: str = "id=1", **more: object) -> NewClaim:
    claimed = NewClaim(key, "1", "work", 100.0, RAW, token=token, kept_until=kept_until)
    return msgspec.structs.replace(claimed, **more)


def marks(table: Holders) -> dict[str, str]:
    return {key: one.mark for key, one in table.items()}


def test_of_two_tasks_with_one_id_the_first_has_it() -> None:
    """And only its own end frees it, however late another one's end is told."""
    first, second = Entry(at=1.0, claims=[of_an_id("a")]), Entry(at=2.0, claims=[of_an_id("b")])
    assert marks(holders(first, second)) == {"id=1": "a"}
    ended = Entry(at=3.0, ended=[("id=1", "a", False)])
    assert marks(holders(first, second, ended)) == {}
    assert marks(holders(first, ended, second, ended)) == {"id=1": "b"}
    assert marks(holders(first, ended, second, Entry(freed=[("id=1", "a")]))) == {"id=1": "b"}
    table = holders(first, Entry(stored=[("id=1", "b")]))
    assert [key for key, _ in table.overdue(99.0)] == ["id=1"]


def test_a_dead_letter_has_its_id() -> None:
    """Through a purge, but not when it is dropped, or its queue deleted; one that lives again is like any other."""
    dead = [Entry(at=1.0, claims=[of_an_id("a")]), Entry(at=2.0, ended=[("id=1", "a", True)])]
    purged, deleted = Entry(at=3.0, emptied=[Emptied("work")]), Entry(at=3.0, emptied=[Emptied("work", with_dead=True)])
    assert marks(holders(*dead, Entry(stored=[("id=1", "a")]), purged)) == {"id=1": "a"}
    assert marks(holders(*dead, deleted)) == {}
    assert marks(holders(*dead, Entry(at=3.0, ended=[("id=1", "a", False)]))) == {}
    assert marks(holders(*dead, Entry(at=3.0, cancelled=["1"]))) == {"id=1": "a"}
    assert marks(holders(*dead, Entry(at=3.0, claims=[of_an_id("a")]), purged)) == {}


def test_an_id_may_outlast_its_task() -> None:
    first = Entry(at=1.0, claims=[of_an_id("a", kept_until=50.0)])
    for end in (
        Entry(at=2.0, ended=[("id=1", "a", False)]),
        Entry(at=2.0, cancelled=["1"]),
        Entry(at=2.0, emptied=[Emptied("work", with_dead=True)]),
    ):
        assert marks(holders(first, end, Entry(at=49.0, claims=[of_an_id("b")]))) == {"id=1": "a"}
        assert marks(holders(first, end, Entry(at=51.0, claims=[of_an_id("b")]))) == {"id=1": "b"}
        assert holders(first, end).overdue(99.0) == []
        assert marks(holders(first, end, Entry(at=3.0, freed=[("id=1", "a")]))) == {}
    assert marks(holders(first, Entry(at=51.0, ended=[("id=1", "a", False)]))) == {}
    assert marks(holders(first, Entry(at=2.0, freed=[("id=1", "a")]))) == {}


def test_all_keys_of_a_task_are_taken_or_none() -> None:
    """And its task is there once, for whoever completes it."""
    both = of_an_id("a", key="k", more=[AnotherKey("id=1", 100.0)])
    table = holders(Entry(at=1.0, claims=[both]))
    assert marks(table) == {"k": "a", "id=1": "a"}
    assert [key for key, _ in table.overdue(99.0)] == ["k"]
    for taken in (claim("k", "9"), of_an_id("b")):
        table = holders(Entry(at=1.0, claims=[taken]), Entry(at=2.0, claims=[both]))
        assert list(marks(table)) == [taken.key]
    table = holders(
        Entry(at=1.0, claims=[both]), Entry(freed=[("k", "a")], ended=[("id=1", "a", True)]), Entry(claims=[both])
    )
    assert marks(table) == {"k": "a", "id=1": "a"}
    assert entry_of(encode(Entry(claims=[of_an_id("a", more=[AnotherKey("", 1.0)])]))) is None


def replacing(
    key: str, id_: str, due: float | None = None, *, latest: float | None = None, taken: bool = False
) -> NewClaim:
    task = msgspec.Raw(msgspec.json.encode(msgspec.structs.replace(TASK, id=id_)))
    terms = Terms(replaces=True, due=due, latest=latest, until_taken=taken)
    return NewClaim(key, id_, "work", 100.0, task, terms=terms)


def newest(turn: Turn) -> str:
    found = turn.replacement()
    return "" if found is None else found.id


def test_the_newest_claim_replaces_the_task_of_the_first() -> None:
    """If that one may be replaced, by one that wants to."""
    table = holders(
        Entry(at=1.0, claims=[replacing("k", "1"), claim("l", "2")]),
        Entry(at=2.0, claims=[replacing("k", "3"), replacing("l", "4"), claim("k", "5")]),
        Entry(at=3.0, claims=[replacing("k", "6")]),
    )
    assert ids(table) == {"k": "1", "l": "2"}
    assert newest(table.turn("k", "1", 4.0)) == "6"
    assert table.turn("l", "2", 4.0) == table.turn("k", "3", 4.0) == Turn()


def test_a_task_that_is_put_off_is_not_taken() -> None:
    """As far as the first claim lets others put it off."""
    began = Entry(at=1.0, claims=[replacing("k", "1", 5.0, latest=12.0, taken=True)])
    later = [Entry(at=at, claims=[replacing("k", f"{at}", at + 5.0)]) for at in (4.0, 8.0)]
    early = Entry(at=11.0, taken=[("k", "1")])
    table = holders(began, *later, early)
    assert table.turn("k", "1", 11.0) == Turn(due=12.0)
    assert ids(table) == {"k": "1"}
    table = holders(began, *later, early, Entry(at=12.5, taken=[("k", "1")], claims=[replacing("k", "9", 17.0)]))
    assert (ids(table), newest(table.turn("k", "1", 12.5))) == ({}, "9")


def test_what_has_replaced_a_task_is_known_until_it_can_come_no_more() -> None:
    """Its key is the next one's, and its end is told again by whoever runs it again."""
    entries = [
        Entry(at=1.0, claims=[replacing("k", "1", taken=True), replacing("k", "2"), replacing("l", "5")]),
        Entry(at=2.0, claims=[replacing("l", "6")], taken=[("k", "1"), ("l", "5")]),
        Entry(at=3.0, claims=[replacing("k", "3", taken=True)]),
        Entry(at=4.0, freed=[("k", "1"), ("l", "5")]),
    ]
    table = holders(*entries)
    assert ids(table) == {"k": "3"}
    assert (newest(table.turn("k", "1", 5.0)), newest(table.turn("l", "5", 5.0))) == ("2", "6")
    assert table.is_over("1")
    table = holders(*entries, Entry(at=5.0 + REMEMBERED, freed=[("m", "7")]))
    assert table.turn("k", "1", 5.0) == table.turn("l", "5", 5.0) == Turn()
    assert newest(holders(*entries[:3]).turn("l", "5", 5.0)) == "6"
