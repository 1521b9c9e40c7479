"""What a candidate for a table decides, driven by a queue of paper: what it publishes comes back when the test says."""

from __future__ import annotations

import random
from collections import deque
from itertools import count
from typing import NamedTuple

import pytest

from leveret.brokers.rabbitmq.coordination import machine
from leveret.brokers.rabbitmq.coordination.entries import Entry, Foreign, Hello, Row, Version
from leveret.brokers.rabbitmq.coordination.machine import (
    Acknowledge,
    Action,
    Applied,
    Candidate,
    Doubt,
    Holding,
    Refused,
    Send,
    Stored,
)

WALL = 1_700_000_000.0


class Driven:
    """One candidate, the time, and what it wants done."""

    def __init__(self, *, reads: bool = False, me: str = "me") -> None:
        self.now = 100.0
        self.me = me
        self.candidate = Candidate(me, self.now, self.now + WALL, reads=reads)
        self.sent: deque[Send] = deque()
        self.acknowledged: list[int] = []
        self.others: list[Action] = []
        self.tags = count(1)
        self.do(self.candidate.begin(self.now))

    def do(self, actions: list[Action]) -> list[Action]:
        for action in actions:
            if isinstance(action, Send):
                self.sent.append(action)
            elif isinstance(action, Acknowledge):
                self.acknowledged += action.tags
            else:
                self.others.append(action)
        return actions

    def deliver(self, *entries: Entry, redelivered: bool = False) -> list[int]:
        tags = [next(self.tags) for _ in entries]
        found = [(entry, tag, redelivered) for entry, tag in zip(entries, tags, strict=True)]
        self.do(self.candidate.delivered(found, self.now))
        return tags

    def bring_back(self) -> list[int]:
        """Deliver what was sent so far, in order."""
        sent, self.sent = self.sent, deque()
        return self.deliver(*(one.entry for one in sent)) if sent else []

    def look(self, seconds: float = 0.5) -> None:
        self.now += seconds
        self.do(self.candidate.look(self.now, self.now + WALL))

    def change(self, key: str, value: bytes | None, *, rides: bool = False) -> Send:
        send = self.candidate.change(key, value, self.now, rides=rides)
        self.sent.append(send)
        return send

    def hold(self, *rows: Row) -> list[int]:
        """Come to hold the table with these rows; their tags."""
        tags = self.deliver(*rows, redelivered=True) if rows else []
        for _ in range(4):
            self.bring_back()
        assert self.phase == "HOLDING"
        return tags

    @property
    def phase(self) -> str:
        return self.candidate.phase.name

    @property
    def doubts(self) -> list[str]:
        return [one.reason for one in self.others if isinstance(one, Doubt)]


def row(
    key: str, epoch: int, number: int, value: bytes | None = b"v", *, by: str = "other", rides: bool = False
) -> Row:
    return Row(key, Version(epoch, number, by), value, rides)


@pytest.fixture
def one() -> Driven:
    return Driven()


def test_an_empty_table_is_held_after_three_messages_of_its_own_came_back(one: Driven) -> None:
    (hello,) = one.sent
    assert isinstance(hello.entry, Hello)
    one.bring_back()
    assert one.phase == "LOADING"
    one.bring_back()
    (epoch,) = one.sent
    assert epoch.entry == Row(machine.EPOCH, Version(1, 3, "me"), b"")
    assert one.phase == "CLAIMING"
    assert not one.acknowledged
    one.bring_back()
    assert one.phase == "HOLDING"
    assert [type(action) for action in one.others if isinstance(action, Holding)] == [Holding]
    assert one.acknowledged == [1, 2]


def test_rows_are_read_and_the_epoch_is_one_more_than_any_that_was_seen(one: Driven) -> None:
    tags = one.hold(row("", 7, 3, b""), row("a", 5, 1, b"1"), row("b", 8, 1, b"2"))
    assert one.candidate.epoch == 9
    assert one.candidate.rows() == {"a": b"1", "b": b"2"}
    assert set(one.acknowledged) & set(tags) == {tags[0]}, "the last epoch's row alone is spent"


def test_a_hello_of_ours_from_before_is_no_sentinel(one: Driven) -> None:
    """It may stand before rows that are still coming back from the last holder."""
    early = one.sent.popleft().entry
    one.deliver(early)
    assert one.phase == "LOADING"
    one.deliver(early)
    assert one.phase == "LOADING"


def test_who_was_delivered_something_before_it_began_sends_one_hello() -> None:
    candidate = Candidate("me", 1.0, 1.0, reads=True)
    (hello,) = candidate.delivered([(row("a", 1, 1), 1, True)], 1.0)
    assert isinstance(hello, Send)
    assert candidate.begin(1.0) == []


@pytest.mark.parametrize("is_newest_first", [True, False])
def test_of_two_rows_of_a_key_the_newer_stays(one: Driven, *, is_newest_first: bool) -> None:
    pair = [row("a", 2, 9, b"old"), row("a", 3, 1, b"new")]
    tags = one.hold(*(reversed(pair) if is_newest_first else pair))
    assert one.candidate.value("a") == b"new"
    stays = tags[0 if is_newest_first else 1]
    assert set(one.acknowledged) & set(tags) == set(tags) - {stays}


def test_the_same_message_again_is_never_acknowledged_for_the_other(one: Driven) -> None:
    """RabbitMQ 4.3 activates the same consumer again without a word: one of the tags is dead, and none knows which."""
    tags = one.hold(row("a", 2, 9), row("a", 2, 9))
    assert not set(one.acknowledged) & set(tags)
    one.change("a", b"new")
    one.bring_back()
    assert set(one.acknowledged) >= set(tags)


def test_a_change_counts_when_it_comes_back_and_the_old_row_goes_then(one: Driven) -> None:
    (old,) = one.hold(row("a", 1, 1, b"1"))
    send = one.change("a", b"2")
    one.do(one.candidate.confirmed(send.number, one.now))
    assert one.candidate.value("a") == b"1", "a confirm proves nothing"
    assert old not in one.acknowledged
    one.bring_back()
    assert one.candidate.value("a") == b"2"
    assert old in one.acknowledged
    assert Applied(Version(2, send.number, "me")) in one.others


def test_changes_of_a_key_that_are_under_way_together_keep_their_order(one: Driven) -> None:
    one.hold()
    one.change("a", b"1")
    one.change("a", b"2")
    tags = one.bring_back()
    assert one.candidate.value("a") == b"2"
    assert tags[0] in one.acknowledged
    assert tags[1] not in one.acknowledged


def test_a_removed_row_leaves_a_tombstone_for_a_while(one: Driven) -> None:
    (old,) = one.hold(row("a", 1, 1))
    one.change("a", None)
    (tombstone,) = one.bring_back()
    assert one.candidate.rows() == {}
    assert old in one.acknowledged
    for _ in range(200):
        one.look()
        one.bring_back()
    assert tombstone in one.acknowledged
    assert len(one.candidate) == 1, "the epoch's row"


def test_a_tombstone_wins_over_the_row_that_came_back_beside_it(one: Driven) -> None:
    one.hold(row("a", 3, 1, None), row("a", 2, 1, b"v"))
    assert one.candidate.rows() == {}


def test_what_was_delivered_before_ends_a_tenure(one: Driven) -> None:
    (tag,) = one.hold(row("a", 1, 1))
    one.deliver(row("a", 1, 1), redelivered=True)
    assert one.doubts
    assert tag not in one.acknowledged


def test_another_s_epoch_ends_a_tenure(one: Driven) -> None:
    one.hold()
    one.deliver(row("", one.candidate.epoch, 1, b""))
    assert one.doubts


def test_a_row_of_an_older_epoch_that_comes_late_is_dropped_where_a_newer_one_is_held(one: Driven) -> None:
    one.hold(row("a", 4, 1, b"1"))
    one.change("a", b"2")
    one.bring_back()
    (late,) = one.deliver(row("a", 4, 2, b"stale"))
    assert late in one.acknowledged
    assert one.candidate.value("a") == b"2"
    assert not one.doubts


def test_a_row_of_an_older_epoch_that_was_not_read_has_all_be_read_again(one: Driven) -> None:
    """It may be a stale holder's, whose change nobody counted, or one that came back late; joining anew reads both."""
    one.hold(row("a", 3, 1, b"1"), row("", 4, 1, b""))
    (late,) = one.deliver(row("a", 4, 2, b"?"))
    assert one.doubts
    assert late not in one.acknowledged


def test_a_second_claim_of_the_same_epoch_is_seen_before_the_own_row_is_back(one: Driven) -> None:
    one.bring_back()
    one.bring_back()
    assert one.phase == "CLAIMING"
    one.deliver(row("", 1, 5, b"", by="rival"))
    assert one.doubts
    one.bring_back()
    assert one.phase == "OVER"


def test_silence_is_doubted_and_an_alarm_is_not(one: Driven) -> None:
    one.hold()
    one.sent.clear()
    for _ in range(12):
        one.look()
        one.candidate.rest(one.now)
    assert not one.doubts
    for _ in range(4):
        one.look()
    assert not one.doubts
    for _ in range(4):
        one.look()
    assert one.doubts


def test_a_confirmed_hello_that_does_not_come_back_is_doubted(one: Driven) -> None:
    """The row's publish went through, and its delivery went to somebody else."""
    one.hold()
    for _ in range(8):
        one.look()
        while one.sent:
            one.do(one.candidate.confirmed(one.sent.popleft().number, one.now))
    assert one.doubts


def test_who_stands_by_needs_confirms_alone(one: Driven) -> None:
    for _ in range(100):
        one.look()
        while one.sent:
            one.do(one.candidate.confirmed(one.sent.popleft().number, one.now))
    assert not one.doubts
    for _ in range(8):
        one.look()
    assert one.doubts


def test_hellos_go_out_about_once_a_second(one: Driven) -> None:
    one.hold()
    one.sent.clear()
    total = 0
    for _ in range(20):
        one.look()
        total += len(one.sent)
        one.bring_back()
    assert 9 <= total <= 11


def test_a_holder_that_is_delivered_others_hellos_sends_none_of_its_own(one: Driven) -> None:
    one.hold()
    one.sent.clear()
    for number in range(20):
        one.deliver(Hello("other", number))
        one.look()
    assert not one.sent
    for _ in range(8):
        one.look()
    assert one.doubts


def test_after_a_standstill_what_came_meanwhile_is_read_first(one: Driven) -> None:
    one.hold()
    one.sent.clear()
    one.look(14.0)
    assert not one.doubts
    assert not one.candidate.is_fresh(one.now)
    one.bring_back()
    assert one.candidate.is_fresh(one.now)


def test_a_proof_from_before_a_standstill_is_none(one: Driven) -> None:
    one.hold()
    one.do(one.candidate.prove(one.now))
    one.now += 14.0
    one.bring_back()
    assert not one.candidate.is_fresh(one.now)


def test_a_proof_ages(one: Driven) -> None:
    one.hold()
    assert one.candidate.is_fresh(one.now)
    one.now += machine.FRESH * 1.01
    assert not one.candidate.is_fresh(one.now)


def test_a_jump_of_the_wall_clock_is_doubted(one: Driven) -> None:
    """The machine was suspended: the monotonic clock stood still."""
    one.hold()
    one.now += 0.5
    one.do(one.candidate.look(one.now, one.now + WALL + 3_600))
    assert one.doubts


def test_rows_are_renewed_before_they_are_too_old(one: Driven) -> None:
    tags = one.hold(*(row(f"k{number}", 1, number) for number in range(300)))
    for _ in range(int(machine.RENEW * 3)):
        one.look()
        one.bring_back()
    assert not one.doubts
    assert set(tags) <= set(one.acknowledged)
    assert len(one.candidate.rows()) == 300


def test_a_row_that_is_being_changed_is_not_renewed_over_it(one: Driven) -> None:
    one.hold(row("a", 1, 1, b"old"))
    one.sent.clear()
    one.now += machine.RENEW + 1
    one.change("a", b"new")
    kept = one.sent.popleft()
    for _ in range(20):
        one.look()
        one.bring_back()
    one.deliver(kept.entry)
    assert one.candidate.value("a") == b"new"
    assert not [send for send in one.sent if isinstance(send.entry, Row) and send.entry.value == b"old"]


def test_what_is_neither_row_nor_hello_goes_and_a_newer_release_s_row_stays(one: Driven) -> None:
    one.hold()
    stays, goes = one.deliver(Foreign(is_kept=True), Foreign(is_kept=False))
    assert goes in one.acknowledged
    assert stays not in one.acknowledged
    assert not one.doubts


def test_a_refused_row_ends_the_tenure(one: Driven) -> None:
    one.hold()
    send = one.change("a", b"1")
    one.do(one.candidate.refused(send.number, one.now))
    assert one.doubts


class TestRowsOnTasks:
    @pytest.mark.parametrize("is_confirmed_first", [True, False])
    def test_both_are_stored_when_it_came_back_and_was_confirmed(
        self, one: Driven, *, is_confirmed_first: bool
    ) -> None:
        (old,) = one.hold(row("a", 1, 1, b"1"))
        send = one.change("a", b"2", rides=True)
        stored = Stored(Version(one.candidate.epoch, send.number, "me"))
        if is_confirmed_first:
            one.do(one.candidate.confirmed(send.number, one.now))
        else:
            one.bring_back()
        assert stored not in one.others
        assert old not in one.acknowledged
        one.bring_back() if is_confirmed_first else one.do(one.candidate.confirmed(send.number, one.now))
        assert stored in one.others
        assert old in one.acknowledged
        assert one.candidate.value("a") == b"2"
        assert not one.candidate.uncertain()

    @pytest.mark.parametrize("is_refused_first", [True, False])
    def test_a_refused_task_puts_its_row_back(self, one: Driven, *, is_refused_first: bool) -> None:
        one.hold(row("a", 1, 1, b"1"))
        send = one.change("a", b"2", rides=True)
        if is_refused_first:
            one.do(one.candidate.refused(send.number, one.now))
        one.bring_back()
        if not is_refused_first:
            one.do(one.candidate.refused(send.number, one.now))
        assert Refused(Version(one.candidate.epoch, send.number, "me")) in one.others
        one.bring_back()
        assert one.candidate.value("a") == b"1"
        assert not one.doubts

    @pytest.mark.parametrize("is_newest_first", [True, False])
    def test_the_next_holder_knows_which_are_uncertain(self, one: Driven, *, is_newest_first: bool) -> None:
        pair = [row("a", 2, 1, b"1"), row("a", 2, 2, b"2", rides=True)]
        tags = one.hold(*(reversed(pair) if is_newest_first else pair), row("b", 2, 3, b"3", rides=True))
        assert one.candidate.uncertain() == {"a"}
        assert one.candidate.rows() == {"a": b"2", "b": b"3"}
        assert not set(tags) & set(one.acknowledged), "the holder after this one must see it too"
        one.change("a", b"2")
        one.bring_back()
        assert one.candidate.uncertain() == frozenset()
        assert set(tags[:2]) <= set(one.acknowledged)

    def test_an_uncertain_row_is_not_renewed(self, one: Driven) -> None:
        one.hold(row("a", 2, 1, b"1"), row("a", 2, 2, b"2", rides=True))
        for _ in range(int(machine.RENEW * 3)):
            one.look()
            one.bring_back()
        assert one.candidate.uncertain() == {"a"}


class TestReaders:
    def test_it_reads_and_leaves_all_as_it_was(self) -> None:
        reader = Driven(reads=True)
        tags = reader.deliver(
            row("a", 3, 1, b"old"), row("a", 3, 2, b"1"), row("b", 3, 4, None), Hello("other", 1), redelivered=True
        )
        reader.bring_back()
        assert Holding() in reader.others
        assert reader.candidate.rows() == {"a": b"1"}
        assert not set(tags) & set(reader.acknowledged)
        assert len(reader.acknowledged) == 2, "its own two hellos"
        assert not [send for send in reader.sent if isinstance(send.entry, Row)]


# A queue of paper with any number of candidates: what happens at random, and what may never happen.


class Message(NamedTuple):
    entry: Entry
    was_delivered: bool = False


class Paper:
    """A queue with a single active consumer, and what is on its way to it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.ready: deque[Message] = deque()
        self.members: list[Member] = []
        self.names = count(1)
        self.confirmed_values: dict[str, set[bytes]] = {}
        #: By key: what counted last, and all that was sent after it and may count.
        self.counted: dict[str, bytes | None] = {}
        self.may_count: dict[str, set[bytes | None]] = {}

    def join(self) -> Member:
        member = Member(self, f"m{next(self.names):03}")
        self.members.append(member)
        return member

    @property
    def active(self) -> Member | None:
        return next((one for one in self.members if one.is_consuming), None)

    def step(self) -> None:
        """One thing that can happen next."""
        self.now += self.random.uniform(0.0, 0.05)
        member = self.random.choice(self.members)
        what = self.random.random()
        if what < 0.5:
            self.deliver()
        elif what < 0.75:
            member.pass_on(self.random.randint(1, 3))
        elif what < 0.9:
            member.act()
        elif what < 0.98:
            member.look()
        elif what < 0.985:
            member.die()
        elif what < 0.993:
            member.heal()
        else:
            member.cut_off()
        for one in list(self.members):
            if one.is_gone and not one.late:
                self.members.remove(one)
        while sum(not one.is_gone for one in self.members) < 3:
            self.join()

    def deliver(self) -> None:
        if self.active is not None and self.ready:
            self.active.take(self.ready.popleft())

    def store(self, entry: Entry) -> None:
        self.ready.append(Message(entry))


class Member:
    def __init__(self, paper: Paper, me: str) -> None:
        self.paper = paper
        self.me = me
        self.candidate = Candidate(me, paper.now, paper.now + WALL)
        self.is_consuming = True
        #: Its connection is lost, and all that it had published has arrived or never will.
        self.is_gone = False
        #: Its node was parted from the others: another is active, and what this one publishes arrives some time.
        self.is_cut = False
        self.late: deque[Send] = deque()
        self.unacknowledged: dict[int, Message] = {}
        self.tags = count(1)
        self.writing: dict[int, tuple[str, bytes | None]] = {}
        self.out: deque[Send] = deque()
        self.do(self.candidate.begin(paper.now))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.out.append(action)
            elif isinstance(action, Acknowledge):
                for tag in action.tags:
                    self.unacknowledged.pop(tag, None)
            elif isinstance(action, Applied) and action.version.number in self.writing:
                key, value = self.writing.pop(action.version.number)
                self.paper.counted[key] = value
                self.paper.may_count[key] = {value} | {one for name, one in self.writing.values() if name == key}
            elif isinstance(action, Doubt):
                self.die()
        if self.paper.active is self and self.candidate.is_fresh(self.paper.now):
            self.check()

    def check(self) -> None:
        """What counted is there, or what was sent after it."""
        for key, values in self.paper.may_count.items():
            assert self.candidate.value(key) in values, f"{key} of {self.me}"

    def take(self, message: Message) -> None:
        tag = next(self.tags)
        self.unacknowledged[tag] = message
        self.do(self.candidate.delivered([(message.entry, tag, message.was_delivered)], self.paper.now))

    def pass_on(self, number: int) -> None:
        """Some of what it published reaches the queue, and is confirmed."""
        source = self.late if self.is_gone else self.out
        if self.is_cut and not self.is_gone and self.paper.random.random() < 0.9:
            return
        for _ in range(min(number, len(source))):
            send = source.popleft()
            self.paper.store(send.entry)
            if not self.is_gone:
                self.do(self.candidate.confirmed(send.number, self.paper.now))

    def act(self) -> None:
        if self.is_gone or not self.candidate.is_fresh(self.paper.now):
            return
        key = self.paper.random.choice("abcde")
        value = None if self.paper.random.random() < 0.1 else f"{self.me}.{self.paper.now:.3f}".encode()
        send = self.candidate.change(key, value, self.paper.now)
        self.writing[send.number] = (key, value)
        self.paper.may_count.setdefault(key, {None}).add(value)
        self.out.append(send)

    def look(self) -> None:
        if not self.is_gone:
            self.do(self.candidate.look(self.paper.now, self.paper.now + WALL))

    def die(self) -> None:
        """Its connection is lost. Of one that was cut off, what it has published may arrive all the same."""
        self.is_gone = True
        if self.is_cut:
            self.late = self.out
        self.give_back()

    def cut_off(self) -> None:
        """Another takes over, and this one does not know it."""
        self.is_cut = True
        self.give_back()

    def heal(self) -> None:
        """It consumes again, on the same channel, and nobody told it of either (RabbitMQ 4.3)."""
        if self.is_cut and not self.is_gone:
            self.is_cut, self.is_consuming = False, True
            self.paper.members.remove(self)
            self.paper.members.append(self)  # it waits for its turn again

    def give_back(self) -> None:
        """What it held is before all that waits."""
        self.is_consuming = False
        back = [one._replace(was_delivered=True) for _, one in sorted(self.unacknowledged.items())]
        self.paper.ready.extendleft(reversed(back))
        self.unacknowledged.clear()


@pytest.mark.parametrize("seed", range(60))
def test_nothing_that_counted_is_ever_lost(seed: int) -> None:
    paper = Paper(seed)
    for _ in range(3):
        paper.join()
    for _ in range(4_000):
        paper.step()
    assert paper.counted


def test_a_dropped_row_is_acknowledged_at_once_and_leaves_no_tombstone(one: Driven) -> None:
    (tag, *_) = one.hold(row("a", 5, 1), row("b", 5, 2))
    one.do(one.candidate.drop(["a", "never there"]))
    assert tag in one.acknowledged
    assert one.candidate.rows() == {"b": b"v"}
    assert not one.sent


def test_what_comes_back_of_a_dropped_row_goes_too(one: Driven) -> None:
    """A permit may end before its row came back, and while it is published anew."""
    one.hold()
    one.change("a", b"1", rides=True)
    one.do(one.candidate.drop(["a"]))
    send = one.sent[0]
    (tag,) = one.bring_back()
    assert tag in one.acknowledged
    assert one.candidate.rows() == {}
    one.do(one.candidate.confirmed(send.number, one.now))
    assert Stored(send.entry.version) in one.others, "whoever enqueued it is told all the same"  # type: ignore[union-attr]


def test_a_key_that_was_dropped_may_be_set_again(one: Driven) -> None:
    one.hold()
    one.change("a", b"1")
    one.do(one.candidate.drop(["a"]))
    one.bring_back()
    one.change("a", b"2")
    one.bring_back()
    assert one.candidate.rows() == {"a": b"2"}
