"""What entries of the claims log add up to."""

from __future__ import annotations

import msgspec

from leveret.brokers.rabbitmq.coordination.entries import Adopted, Emptied, Entry, Holders, NewClaim, encode, entry_of
from leveret.model import Envelope

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
    assert held is not None
    assert held.owner == "b"
    assert held.envelope() == TASK
    assert [key for key, _ in table.overdue(1.5)] == ["k"]
    assert list(table.overdue(0.5)) == []


def test_what_is_stored_is_nobodys_to_complete() -> None:
    first = Entry(by="a", at=1.0, claims=[claim("k", "1")])
    table = holders(
        first, Entry(by="a", stored=[("k", "2")]), Entry(stored=[("k", "1")]), Entry(adopted=[Adopted("k", "1", "a")])
    )
    held = table.get("k")
    assert held is not None
    assert (held.owner, held.envelope(), table.overdue(99.0)) == ("a", None, [])


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
    held = holders(Entry(claims=[forged])).get("k")
    assert held is not None
    assert held.envelope() is None
