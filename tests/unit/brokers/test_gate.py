"""Who goes next: the gate against a plain model that looks at everything that waits."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.brokers.gate import Gate, Permit, Permits
from leveret.model import LimitRow, LimitRule, Rate, queue_limit

if TYPE_CHECKING:
    from leveret.model import LimitRef


def gate(began: float | None = None, **rules: LimitRule) -> Gate[str]:
    return gate_of(rules, began)


def gate_of(rules: dict[str, LimitRule], began: float | None = None) -> Gate[str]:
    made: Gate[str] = Gate(Permits(began))
    made.define({name: LimitRow(name, rule) for name, rule in rules.items()})
    return made


def ref(name: str, key: str = "") -> tuple[LimitRef, ...]:
    return ((name, key),)


def add(to: Gate[str], *ids: str, refs: tuple[LimitRef, ...] = (), queue: str = "q", fair: str | None = None) -> None:
    for id_ in ids:
        to.add(id_, queue, refs, fair, 4, id_)


def admitted(of: Gate[str], most: int = 100, now: float = 0.0, queue: str = "q") -> list[str]:
    return [id_ for id_, _ in of.admit(queue, most, now)]


def test_no_more_than_its_concurrency_is_admitted() -> None:
    it = gate(stripe=LimitRule(2))
    add(it, "a", "b", "c", "d", refs=ref("stripe"))
    assert admitted(it) == ["a", "b"]
    assert admitted(it) == []
    assert it.end("a")
    assert not it.end("a")
    assert admitted(it) == ["c"]


def test_a_limit_that_nobody_defined_lets_all_go() -> None:
    it = gate()
    add(it, "a", "b", refs=ref("gone"))
    assert admitted(it) == ["a", "b"]


def test_keys_hold_up_nobody_but_themselves() -> None:
    it = gate(tenant=LimitRule(1))
    add(it, "a1", "a2", refs=ref("tenant", "a"))
    add(it, "b1", "b2", refs=ref("tenant", "b"))
    assert admitted(it) == ["a1", "b1"]
    it.end("b1")
    assert admitted(it) == ["b2"]


def test_of_two_limits_both_or_none_are_taken() -> None:
    it = gate(stripe=LimitRule(1), tenant=LimitRule(1))
    add(it, "a", refs=(("stripe", ""), ("tenant", "a")))
    add(it, "b", refs=(("stripe", ""), ("tenant", "b")))
    add(it, "c", refs=ref("tenant", "b"))
    assert admitted(it) == ["a", "c"]  # b waits for stripe, and holds nothing of its tenant's
    it.end("a")
    assert admitted(it) == []  # and now for its tenant
    it.end("c")
    assert admitted(it) == ["b"]


def test_what_one_that_was_woken_cannot_use_goes_to_the_next() -> None:
    it = gate(stripe=LimitRule(1), tenant=LimitRule(1))
    add(it, "a1", "a2", refs=(("stripe", ""), ("tenant", "a")))
    add(it, "b1", refs=(("stripe", ""), ("tenant", "b")))
    it.permits.restore("other", Permit("q", (("tenant", "a"),)))
    assert admitted(it) == ["b1"]
    it.end("b1")
    assert admitted(it) == []
    it.end("other")
    assert admitted(it) == ["a1"]


def test_a_queue_that_nobody_takes_from_keeps_nothing_from_the_others() -> None:
    it = gate(stripe=LimitRule(1))
    add(it, "a", refs=ref("stripe"))
    add(it, "idle", refs=ref("stripe"), queue="idle")
    add(it, "b", refs=ref("stripe"))
    assert admitted(it) == ["a"]
    assert admitted(it, queue="idle") == []
    it.end("a")
    assert admitted(it) == ["b"]


def test_the_limit_of_a_queue_counts_all_of_its_tasks() -> None:
    it = gate_of({queue_limit("q"): LimitRule(1)})
    add(it, "a")
    add(it, "b", refs=ref("stripe"))
    assert admitted(it) == ["a"]
    it.end("a")
    assert admitted(it) == ["b"]


def test_who_has_few_tasks_is_served_in_turn_with_who_has_many() -> None:
    it = gate()
    add(it, *(f"a{n}" for n in range(10)), fair="a")
    add(it, "b0", "b1", fair="b")
    assert admitted(it, 5) == ["a0", "b0", "a1", "b1", "a2"]


def test_the_lanes_of_one_share_its_turn() -> None:
    it = gate(stripe=LimitRule(100))
    add(it, "a0", "a1", fair="a")
    add(it, "a2", "a3", refs=ref("stripe"), fair="a")
    add(it, "b0", "b1", fair="b")
    found = admitted(it, 4)
    assert sum(id_.startswith("b") for id_ in found) == 2


def test_the_higher_priority_goes_first_also_when_it_came_while_all_were_held_up() -> None:
    it = gate(stripe=LimitRule(1))
    add(it, "first", refs=ref("stripe"))
    assert admitted(it) == ["first"]
    for tenant in "abc":
        it.add(tenant, "q", ref("stripe"), tenant, 4, tenant)
    assert admitted(it) == []
    it.add("urgent", "q", ref("stripe"), "c", 9, "urgent")
    it.end("first")
    assert admitted(it) == ["urgent"]


def test_a_rate_spreads_starts_evenly_after_its_burst() -> None:
    it = gate(api=LimitRule(rate=Rate(10, per=1, burst=3)))
    add(it, *(f"t{n:03}" for n in range(100)), refs=ref("api"))
    starts: list[float] = []
    now = 1_000.0
    while len(starts) < 40:
        starts += [now] * len(admitted(it, now=now))
        following = it.next_time()
        assert following is not None
        now = max(now, following)
    assert starts[:3] == [1_000.0] * 3
    assert starts[-1] - starts[0] == pytest.approx((40 - 3) / 10)
    worst = max(sum(begin <= one < begin + 1 for one in starts) for begin in starts)
    assert worst <= 10 + 3 - 1


def test_a_rate_is_taken_for_spent_by_who_does_not_know_what_started() -> None:
    it = gate(began=1_000.0, api=LimitRule(rate=Rate(10, per=1, burst=3)))
    add(it, "a", refs=ref("api"))
    assert admitted(it, now=1_000.0) == []
    assert it.next_time() == pytest.approx(1_000.1)
    assert admitted(it, now=1_000.1001) == ["a"]


def test_a_rate_that_was_known_before_goes_on() -> None:
    it = gate(began=1_000.0, api=LimitRule(rate=Rate(1, per=3_600)))
    it.permits.restore_rate(("api", ""), 999.0)
    add(it, "a", refs=ref("api"))
    assert admitted(it, now=1_000.0) == ["a"]


def test_one_alarm_serves_all_lanes_that_a_rate_holds_up() -> None:
    it = gate(api=LimitRule(rate=Rate(1, per=1)))
    for n in range(50):
        add(it, f"t{n:02}", refs=ref("api"), fair=str(n))
    now, found = 0.0, []
    for _ in range(50):
        found += admitted(it, now=now)
        now += 1.0
    assert len(found) == 50


def test_a_key_that_rests_lets_nothing_go_until_then() -> None:
    it = gate()
    it.define({"api": LimitRow("api", LimitRule(5), resting={"a": 30.0})})
    add(it, "a", refs=ref("api", "a"))
    add(it, "b", refs=ref("api", "b"))
    assert admitted(it, now=1.0) == ["b"]
    assert it.next_time() == 30.0
    assert admitted(it, now=30.0) == ["a"]


def test_a_pause_ends_when_it_is_resumed() -> None:
    it = gate()
    it.define({"api": LimitRow("api", LimitRule(5), paused=True)})
    add(it, "a", "b", refs=ref("api"))
    assert admitted(it) == []
    it.define({"api": LimitRow("api", LimitRule(5))})
    assert admitted(it) == ["a", "b"]


def test_a_limit_that_is_raised_or_goes_lets_more_go_at_once() -> None:
    it = gate(api=LimitRule(1))
    add(it, *"abcde", refs=ref("api"))
    assert admitted(it) == ["a"]
    it.define({"api": LimitRow("api", LimitRule(3))})
    assert admitted(it) == ["b", "c"]
    it.define({"api": None})
    assert admitted(it) == ["d", "e"]


def test_what_is_removed_is_passed_over() -> None:
    it = gate(api=LimitRule(1))
    add(it, "a", "b", "c", refs=ref("api"))
    assert it.remove("a") == "a"
    assert it.remove("a") is None
    assert admitted(it) == ["b"]
    assert it.waiting("q") == ["c"]
    assert it.clear("q") == ["c"]
    assert len(it) == 0
    it.end("b")
    assert admitted(it) == []


def test_uses_tell_what_each_limit_does() -> None:
    it = gate(api=LimitRule(1), idle=LimitRule(7))
    add(it, "a1", "a2", refs=ref("api", "a"))
    add(it, "b1", refs=ref("api", "b"))
    assert admitted(it) == ["a1", "b1"]
    found = {use.row.name: (use.admitted, use.waiting, use.keys) for use in it.uses()}
    assert found == {"api": (2, 1, 2), "idle": (0, 0, 0)}


class Plain:
    """Looks at everything that waits, each time."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.waiting: list[tuple[int, int, str, tuple[LimitRef, ...], str | None]] = []
        self.turns: dict[object, int] = {}
        self.held: dict[str, tuple[LimitRef, ...]] = {}
        self.places = 0

    def may_go(self, refs: tuple[LimitRef, ...]) -> bool:
        used = Counter(one for held in self.held.values() for one in held)
        return all(used[one] < self.limits.get(one[0], 1_000) for one in refs)

    def place(self, refs: tuple[LimitRef, ...], fair: str | None, rank: int) -> tuple[int, int]:
        return -rank, self.turns.get(fair if fair is not None else refs, 0)

    def best(self) -> tuple[int, int] | None:
        """The priority and the turn of those that may go next; None: nobody may."""
        places = [self.place(refs, fair, rank) for rank, _, _, refs, fair in self.waiting if self.may_go(refs)]
        return min(places, default=None)

    def take(self, id_: str) -> tuple[int, int]:
        one = next(one for one in self.waiting if one[2] == id_)
        rank, _, _, refs, fair = one
        place = self.place(refs, fair, rank)
        alike = [other for other in self.waiting if other[3:] == one[3:] and other[0] == rank]
        assert one[1] == min(other[1] for other in alike), "a task passed one that is like it"
        assert self.may_go(refs), "more were admitted than a limit allows"
        self.waiting.remove(one)
        self.held[id_] = refs
        self.places += 1
        self.turns[fair if fair is not None else refs] = self.places
        return place


_LIMITS = {"one": 1, "two": 2, "tenant": 1}
_REFS = st.lists(
    st.one_of(st.just(("one", "")), st.just(("two", "")), st.tuples(st.just("tenant"), st.sampled_from("abc"))),
    max_size=3,
    unique=True,
).map(tuple)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _REFS, st.sampled_from([None, "x", "y"]), st.sampled_from([2, 4, 9])),
        st.tuples(st.just("admit"), st.integers(1, 3)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("remove"), st.integers(0, 20)),
    ),
    max_size=80,
)


def test_who_was_woken_first_gives_way_when_its_group_was_served() -> None:
    """The limit has room for one, and its first lane is woken; then another lane of that lane's group is served."""
    it = gate(one=LimitRule(1))
    add(it, "a0", "a1", refs=ref("one"))
    it.add("b", "q", ref("one"), "y", 4, "")
    assert admitted(it) == ["a0"]
    it.add("c", "q", (), "y", 4, "")
    it.end("a0")
    assert admitted(it, 1) == ["c"]
    assert admitted(it, 1) == ["a1"]


@settings(max_examples=300, deadline=None)
@given(_STEPS)
def test_it_does_as_one_that_looks_at_all_that_waits(steps: list[tuple[object, ...]]) -> None:
    it = gate_of({name: LimitRule(count) for name, count in _LIMITS.items()})
    plain = Plain(_LIMITS)
    for number, step in enumerate(steps):
        match step:
            case ("add", refs, fair, rank):
                assert isinstance(refs, tuple)
                assert isinstance(rank, int)
                it.add(f"t{number}", "q", refs, fair if isinstance(fair, str) else None, rank, "")
                plain.waiting.append((rank, number, f"t{number}", refs, fair if isinstance(fair, str) else None))
            case ("admit", int(most)):
                for _ in range(most):
                    best = plain.best()
                    found = admitted(it, 1)
                    assert bool(found) == (best is not None)
                    if found:
                        assert plain.take(found[0]) == best
            case ("end", int(which)) if plain.held:
                id_ = sorted(plain.held)[which % len(plain.held)]
                del plain.held[id_]
                assert it.end(id_)
            case ("remove", int(which)) if plain.waiting:
                one = plain.waiting.pop(which % len(plain.waiting))
                it.remove(one[2])
    assert len(it) == len(plain.waiting)
