"""Limits as values: what they may be, what a request makes of them, how they travel."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret.errors import ConfigurationError
from leveret.model import (
    LIMITS,
    MAX_LIMITS,
    DeclareLimits,
    LimitRequest,
    LimitRow,
    LimitRule,
    PauseLimit,
    Queue,
    Rate,
    RemoveLimit,
    RestLimit,
    ResumeLimit,
    SetLimit,
    check_limit_name,
    checked_rule,
    limit_header,
    limit_refs,
    limits_after,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"count": 0}, "Rate: count is 0"),
        ({"count": True}, "Rate: count is True"),
        ({"count": 5, "per": 0}, "Rate: per is 0"),
        ({"count": 5, "per": "minute"}, "Rate: per is 'minute'"),
        ({"count": 5, "burst": 0}, "Rate: burst is 0"),
    ],
)
def test_a_rate_that_lets_nothing_go_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Rate(**arguments)


def test_a_rate_survives_its_way() -> None:
    for rate in (Rate(100, per=timedelta(minutes=1)), Rate(5, burst=2)):
        assert msgspec.json.decode(msgspec.json.encode(rate), type=Rate) == rate
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(rate), type=Rate) == rate
    assert (str(Rate(100, per=60)), str(Rate(1, per=90))) == ("100/minute", "1/90 seconds")
    assert (Rate(100).burst, Rate(5).burst) == (5, 1)


@pytest.mark.parametrize("rule", [{"concurrency": 0}, {"concurrency": -1}, {"rate": 5}, {"concurrency": "five"}])
def test_a_rule_of_nothing_is_refused_and_named(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="limit 'stripe'"):
        checked_rule("limit 'stripe'", rule.get("concurrency"), rule.get("rate"))
    with pytest.raises(ConfigurationError, match="queue 'render'"):
        Queue("render", **rule)


@pytest.mark.parametrize("name", ["", "queue:mail", "a\nb", "x" * 129, 5, None])
def test_a_limit_needs_a_name_that_can_be_shown(name: object) -> None:
    with pytest.raises(ConfigurationError, match="limit name"):
        check_limit_name(name)


def test_the_limits_of_a_message_are_read_with_care() -> None:
    refs = (("stripe", ""), ("tenant", "acme"))
    assert limit_refs({LIMITS: limit_header(refs)}) == refs
    for wrong in (None, 5, "", "{}", '["stripe"]', '[["",""]]', "[[1,2]]", "[" * 10_000, b"[]"):
        assert limit_refs({LIMITS: wrong}) == ()
    many = [(str(number), "") for number in range(100)]
    assert len(limit_refs({LIMITS: limit_header(many)})) == MAX_LIMITS
    assert limit_refs({LIMITS: limit_header([("a", ""), ("a", "")])}) == (("a", ""),)
    assert limit_refs({LIMITS: '[["a","\\ud800"]]'}) == ()


def asked(request: LimitRequest, *rows: LimitRow, now: float = 100.0) -> Mapping[str, LimitRow | None] | None:
    return limits_after(request, {row.name: row for row in rows}, now)


ROW = LimitRow("api", LimitRule(5), started=10.0)


def test_the_newer_program_says_what_a_limit_is() -> None:
    newer = asked(DeclareLimits(20.0, {"api": LimitRule(7), "new": LimitRule(1)}), ROW)
    assert newer == {
        "api": LimitRow("api", LimitRule(7), started=20.0),
        "new": LimitRow("new", LimitRule(1), started=20.0),
    }
    assert asked(DeclareLimits(5.0, {"api": LimitRule(7)}), ROW) == {}
    assert asked(DeclareLimits(10.0, {"api": LimitRule(5)}), ROW) == {}


def test_what_an_operator_sets_stays_until_it_is_taken_back() -> None:
    found = asked(SetLimit("api", LimitRule(2)), ROW)
    assert found is not None
    row = found["api"]
    assert row is not None
    assert row.rule == LimitRule(2)
    declared = asked(DeclareLimits(20.0, {"api": LimitRule(9)}), row)
    assert declared is not None
    after = declared["api"]
    assert after is not None
    assert after.rule == LimitRule(2)
    assert asked(SetLimit("api", None), after) == {"api": LimitRow("api", LimitRule(9), started=20.0)}


def test_a_key_rests_for_the_longer_time_and_what_is_over_is_forgotten() -> None:
    row = msgspec.structs.replace(ROW, resting={"old": 50.0, "acme": 400.0})
    found = asked(RestLimit("api", "acme", 130.0), row)
    assert found is not None
    rested = found["api"]
    assert rested is not None
    assert rested.resting == {"acme": 400.0}
    assert rested.rests_until("acme", 399.0) == 400.0
    assert rested.rests_until("acme", 400.0) is None


def test_pause_resume_and_remove() -> None:
    paused = asked(PauseLimit("api"), ROW)
    assert paused is not None
    row = paused["api"]
    assert row is not None
    assert row.paused
    assert asked(ResumeLimit("api"), row) == {"api": ROW}
    assert asked(RemoveLimit("api"), ROW) == {"api": None}


@pytest.mark.parametrize(
    "request_",
    [SetLimit("gone", None), PauseLimit("gone"), ResumeLimit("gone"), RestLimit("gone", "", 1.0), RemoveLimit("gone")],
)
def test_a_limit_that_is_not_there(request_: LimitRequest) -> None:
    assert asked(request_) is None
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request_), type=LimitRequest) == request_
