"""The steps that travel in a message: what the next one is made of, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from leveret.errors import ConfigurationError
from leveret.model import FLOW, MAX_STEPS, STEP, STEPS, Envelope, Step, next_step, slip, step_id, steps_in, wrong_steps
from leveret.model.chains import takes_result

NOW = 1_800_000_000.0


def done(steps: object, **headers: Any) -> Envelope:
    value = steps if isinstance(steps, str) else json.dumps(steps)
    return Envelope("abc", "here", "first", b"{}", headers={STEPS: value, **headers})


def following(envelope: Envelope, result: bytes | None = b"1") -> Envelope:
    return next_step(envelope, steps_in(envelope.headers), result, NOW)


def test_the_result_comes_before_the_other_arguments() -> None:
    envelope = following(done([{"task": "second", "queue": "there", "args": [2, {"a": "é"}], "kwargs": {"k": [3]}}]))
    assert json.loads(envelope.body) == {"args": [1, 2, {"a": "é"}], "kwargs": {"k": [3]}}
    assert (envelope.id, envelope.task, envelope.queue, envelope.enqueued_at) == ("abc.2", "second", "there", NOW)
    assert envelope.headers == {FLOW: "abc", STEP: "2"}


def test_an_immutable_step_has_its_own_arguments_alone() -> None:
    steps = [{"task": "second", "queue": "there", "args": [2], "immutable": True}]
    envelope = done(steps)
    assert not takes_result(steps_in(envelope.headers))
    assert json.loads(following(envelope, None).body) == {"args": [2], "kwargs": {}}


def test_ids_follow_from_the_chain_whoever_makes_them() -> None:
    steps = [{"task": name, "queue": "q"} for name in "bcd"]
    second = following(done(steps, **{FLOW: "flow", STEP: 4}))
    third = following(second)
    assert [second.id, third.id] == ["flow.5", "flow.6"]
    assert [step.task for step in steps_in(third.headers)] == ["d"]
    assert following(done(steps, **{FLOW: 7, STEP: True})).id == "abc.2"


def test_an_id_fits_a_short_string() -> None:
    assert len(step_id("x" * 255, 2)) == 64
    assert step_id("x" * 255, 2) != step_id("x" * 255, 3)


def test_a_step_has_its_own_options_and_the_trace_of_the_one_before() -> None:
    step = {"task": "b", "queue": "q", "priority": 7, "delay": 60, "expires": 90.5, "headers": {"tenant": "a", "n": 1}}
    envelope = following(done([step], traceparent="00-1", tenant="other"))
    assert (envelope.priority, envelope.due, envelope.expires_at) == (7, NOW + 60, NOW + 90.5)
    assert envelope.headers == {"traceparent": "00-1", "tenant": "a", "n": 1, FLOW: "abc", STEP: "2"}
    assert following(done([{"task": "b", "queue": "q", "at": NOW + 5}])).due == NOW + 5


def test_the_last_step_carries_nothing() -> None:
    assert STEPS not in following(done([{"task": "b", "queue": "q"}])).headers


@pytest.mark.parametrize(
    "steps",
    [
        "", "{}", "[1]", '[{"task": "b"}]', '[{"task": "", "queue": "q"}]', '[{"task": "b", "queue": ""}]',
        '[{"task": "b", "queue": "q", "join": 1}]', '[{"task": "b", "queue": "q", "args": {}}]',
        '[{"task": "b", "queue": "q", "priority": 11}]', '[{"task": "b", "queue": "q", "delay": -1}]',
        '[{"task": "b", "queue": "q", "at": 1e300}]', '[{"task": "b", "queue": "q", "expires": 1e300}]',
        '[{"task": "b", "queue": "q", "headers": {"a": []}}]',
        '[{"task": "b", "queue": "q", "headers": {"leveret-timeout": "soon"}}]', "[" * 1_000, "\ud800",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_said(steps: str) -> None:
    assert STEPS in wrong_steps({STEPS: steps})


def test_text_alone_is_steps() -> None:
    assert "must be text" in wrong_steps({STEPS: 5})
    assert not wrong_steps({})
    assert not wrong_steps({STEPS: "[]"})


def test_a_slip_has_a_limit() -> None:
    steps = [Step("task", "queue", [msgspec.Raw(b'"%b"' % (b"x" * 1_000))]) for _ in range(100)]
    with pytest.raises(ConfigurationError, match=f"100 steps .* limit of {MAX_STEPS}"):
        slip(steps)
    assert steps_in({STEPS: slip(steps[:50])}) == steps[:50]
