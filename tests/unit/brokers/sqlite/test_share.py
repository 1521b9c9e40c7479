"""Dealing tasks to consumers, as a dealer deals cards: one at a time, in turn, to whoever has credit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.brokers.sqlite.dealing import share

credits_of = st.lists(st.none() | st.integers(0, 12), max_size=8)
counts = st.integers(0, 60)


@settings(deadline=None)
@given(credits_of, counts)
def test_no_card_is_dealt_twice_and_none_is_skipped(credit_of: list[int | None], cards: int) -> None:
    hands, _ = share(credit_of, cards)
    dealt = [card for hand in hands for card in hand]
    assert len(hands) == len(credit_of)
    assert sorted(dealt) == list(range(len(dealt)))
    assert len(dealt) <= cards


@settings(deadline=None)
@given(credits_of, counts)
def test_nobody_gets_more_than_the_credit(credit_of: list[int | None], cards: int) -> None:
    hands, _ = share(credit_of, cards)
    assert all(credit is None or len(hand) <= credit for hand, credit in zip(hands, credit_of, strict=True))


@settings(deadline=None)
@given(credits_of, counts)
def test_all_are_dealt_while_there_is_credit(credit_of: list[int | None], cards: int) -> None:
    hands, _ = share(credit_of, cards)
    room = cards if None in credit_of else sum(credit or 0 for credit in credit_of)
    assert sum(map(len, hands)) == min(cards, room)


@settings(deadline=None)
@given(credits_of, counts)
def test_whoever_has_credit_is_never_two_cards_behind(credit_of: list[int | None], cards: int) -> None:
    hands, _ = share(credit_of, cards)
    most = max(map(len, hands), default=0)
    for hand, credit in zip(hands, credit_of, strict=True):
        assert len(hand) >= most - 1 or len(hand) == credit


@settings(deadline=None)
@given(credits_of, counts)
def test_the_cards_go_round(credit_of: list[int | None], cards: int) -> None:
    """In every round each player with credit gets one card, in the order in which they sit."""
    hands, _ = share(credit_of, cards)
    most = max(map(len, hands), default=0)
    in_turn = [hand[number] for number in range(most) for hand in hands if len(hand) > number]
    assert in_turn == list(range(len(in_turn)))


@settings(deadline=None)
@given(credits_of, counts)
def test_the_last_to_get_a_card_stands_last(credit_of: list[int | None], cards: int) -> None:
    """Next time, whoever has waited longest is dealt to first."""
    hands, last = share(credit_of, cards)
    assert last == sorted((player for player, hand in enumerate(hands) if hand), key=lambda player: hands[player][-1])


@pytest.mark.parametrize(
    ("credit_of", "cards", "hands", "last"),
    [
        ([], 3, [], []),
        ([None], 0, [[]], []),
        ([0, 0], 3, [[], []], []),
        ([None], 3, [[0, 1, 2]], [0]),
        ([2, 2], 3, [[0, 2], [1]], [1, 0]),
        ([1, None, 2], 6, [[0], [1, 3, 5], [2, 4]], [0, 2, 1]),
        ([0, 1], 1, [[], [0]], [1]),
    ],
)
def test_some_deals(credit_of: list[int | None], cards: int, hands: list[list[int]], last: list[int]) -> None:
    assert share(credit_of, cards) == (hands, last)
