"""What a queue's consumers are given, when a consumer's credit is for good."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from leveret.brokers.rabbitmq.consumer import QueueCredit


def consuming(credit: int) -> QueueCredit:
    one = QueueCredit(credit)
    one.consumed(credit)
    return one


def test_more_is_what_it_lacks() -> None:
    credit = consuming(10)
    assert credit.missing == 0
    credit.ask(40)
    assert credit.missing == 30
    credit.consumed(30)
    assert credit.missing == 0
    assert not credit.is_uneven


def test_less_is_given_as_what_is_held_is_settled() -> None:
    credit = consuming(40)
    credit.ask(3)
    assert credit.missing < 0
    credit.cancelled({*range(40)})
    given = []
    for tag in range(40):
        credit.settled(tag)
        if credit.missing > 0:
            given.append((tag, credit.missing))
            credit.consumed(credit.missing)
    assert given == [(37, 1), (38, 1), (39, 1)]
    assert not credit.is_uneven


def test_what_is_stuck_is_given_once() -> None:
    credit = consuming(2)
    credit.stuck(7)
    credit.stuck(7)
    assert (credit.missing, credit.total) == (1, 3)
    credit.consumed(1)
    credit.settled(7)
    assert credit.missing == -1
    credit.stuck(8)
    assert credit.missing == 0


def test_what_is_stuck_keeps_nothing_of_a_cancelled_consumers_credit() -> None:
    credit = consuming(2)
    credit.stuck(7)
    credit.cancelled({7, 8})
    assert credit.missing == 1
    credit.stuck(8)
    assert credit.missing == 2


def test_no_limit_lacks_nothing() -> None:
    credit = consuming(0)
    credit.stuck(1)
    credit.cancelled({1, 2})
    assert (credit.missing, credit.total) == (0, 0)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(1, 40)),
        st.tuples(st.just("settle"), st.integers(0, 60)),
        st.tuples(st.just("pause"), st.just(0)),
    ),
    max_size=60,
)


class Server:
    """Deals from a queue that is never empty to consumers, each as much as it has credit."""

    def __init__(self, credit: int) -> None:
        self.credit = QueueCredit(credit)
        self.held: dict[int, int] = {}
        self._consumers: list[tuple[int, int]] = []
        self._numbers = itertools.count()
        self.deal()

    def ask(self, credit: int) -> None:
        self.credit.ask(credit)
        if self.credit.missing < 0:
            self.pause()

    def settle(self, number: int) -> None:
        if self.held:
            tag = list(self.held)[number % len(self.held)]
            del self.held[tag]
            self.credit.settled(tag)

    def pause(self, _: int = 0) -> None:
        self._consumers = []
        self.credit.cancelled(set(self.held))

    def deal(self) -> None:
        if (missing := self.credit.missing) > 0:
            self._consumers.append((next(self._numbers), missing))
            self.credit.consumed(missing)
        for consumer, most in self._consumers:
            free = most - sum(one == consumer for one in self.held.values())
            self.held |= {next(self._numbers): consumer for _ in range(free)}


@given(st.integers(1, 20), steps)
def test_what_is_held_is_what_was_asked_for(first: int, changes: list[tuple[str, int]]) -> None:
    server, asked = Server(first), first
    for change, number in changes:
        before = len(server.held)
        asked = number if change == "ask" else asked
        getattr(server, change)(number)
        server.deal()
        assert len(server.held) == asked or before >= len(server.held) > asked
