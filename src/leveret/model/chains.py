"""The steps that follow a task: they travel in its message, and each is made of the result of the one before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.bounds import number, shallow
from leveret.model.durations import MAX_DELAY, show
from leveret.model.messages import Envelope, check_priority
from leveret.model.names import MAX_QUEUE_NAME, fits
from leveret.model.options import FLOW, STEP, STEPS, wrong_headers
from leveret.model.text import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: All the steps that follow, as they travel (bytes).
MAX_STEPS = 64 * 1024
#: Part of a trace, which a step hands on (W3C Trace Context and Baggage).
_TRACE = ("traceparent", "tracestate", "baggage")
_MAX_ID = 255
_MAX_WHY = 300
_MOST_STEPS = 2**31
JSON = "application/json"


class Step(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A task that follows, as it travels."""

    task: str
    queue: str
    #: Each as JSON; the result of the step before comes before them.
    args: list[msgspec.Raw] = []
    kwargs: dict[str, msgspec.Raw] = {}
    #: It does not get the result of the step before.
    immutable: bool = False
    priority: int | None = None
    #: How long after the end of the step before it may run (seconds).
    delay: float = 0.0
    #: Unix time before which it must not run.
    at: float | None = None
    #: How long after the end of the step before it may still start (seconds).
    expires: float | None = None
    headers: dict[str, str | int | float | bool | None] = {}


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[Step]).decode


class UnreadableSteps(ValueError):
    """What a message says of the steps that follow is not readable."""


def slip(steps: Sequence[Step]) -> str:
    """The steps as one header carries them. Raises ConfigurationError when they are too large."""
    encoded = _encode(steps)
    if len(encoded) > MAX_STEPS:
        raise ConfigurationError(
            f"the {len(steps)} steps after the first one are {len(encoded)} bytes, over the limit of {MAX_STEPS}: they "
            "travel with each message; store large arguments elsewhere and pass references, or have the last step "
            "enqueue another chain"
        )
    return encoded.decode()


def steps_in(headers: Mapping[str, Any]) -> Sequence[Step]:
    """The steps that follow a message's task. Raises UnreadableSteps."""
    value = headers.get(STEPS)
    if value is None:
        return ()
    if not isinstance(value, str):
        raise UnreadableSteps(f"it is {show(value)}, and must be text")
    try:
        steps = _decode(shallow(value.encode()))
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise UnreadableSteps(f'it is not JSON of the form [{{"task": ..., "queue": ...}}, ...]: {error}') from None
    for step in steps:
        _check(step)
    return steps


def wrong_steps(headers: Mapping[str, Any]) -> str:
    """Why a message cannot run: what is wrong with the steps that follow it; empty if nothing is."""
    try:
        steps_in(headers)
    except UnreadableSteps as error:
        return f"its header {STEPS} says what follows, and {shorten(str(error), _MAX_WHY)}"
    return ""


def takes_result(steps: Sequence[Step]) -> bool:
    """Whether what follows needs what its task returned."""
    return bool(steps) and not steps[0].immutable


def step_id(flow: str, place: int) -> str:
    """The id of a chain's step; the first one has place 1."""
    id_ = f"{flow}.{place}"
    return id_ if fits(id_, _MAX_ID) else hashlib.sha256(id_.encode()).hexdigest()


def next_step(done: Envelope, steps: Sequence[Step], result: bytes | None, now: float) -> Envelope:
    """The first of the steps that follow, to be enqueued now: the same id whenever it is made.

    ``result``: what its task returned, as JSON.
    """
    step, *rest = steps
    flow, place = _place(done)
    args = step.args if step.immutable else [msgspec.Raw(b"null" if result is None else result), *step.args]
    headers: dict[str, Any] = {name: done.headers[name] for name in _TRACE if name in done.headers}
    headers |= step.headers
    headers |= {FLOW: flow, STEP: str(place + 1)}  # texts: messages that have nothing else are read fastest
    if rest:
        headers[STEPS] = _encode(rest).decode()
    return Envelope(
        step_id(flow, place + 1),
        step.queue,
        step.task,
        _encode({"args": args, "kwargs": step.kwargs}),
        JSON,
        1,
        now,
        due=step.at if step.at is not None else now + step.delay if step.delay else None,
        expires_at=None if step.expires is None else now + step.expires,
        headers=headers,
        priority=step.priority,
    )


def _place(done: Envelope) -> tuple[str, int]:
    """The id of a task's chain, and its number there. A producer in another language need not say."""
    flow, found = done.headers.get(FLOW), number(done.headers.get(STEP))
    if not (isinstance(flow, str) and flow):
        flow = done.id
    return flow, int(found) if found is not None and 1 <= found < _MOST_STEPS else 1


def _check(step: Step) -> None:
    """Raises UnreadableSteps."""
    if not fits(step.task, _MAX_ID):
        raise UnreadableSteps(f"a step has the task {show(step.task)}; it must be 1 to {_MAX_ID} bytes")
    if not fits(step.queue, MAX_QUEUE_NAME):
        raise UnreadableSteps(f"a step has the queue {show(step.queue)}; it must be 1 to {MAX_QUEUE_NAME} bytes")
    for name, value, most in (("delay", step.delay, MAX_DELAY), ("expires", step.expires, 100 * MAX_DELAY)):
        if value is not None and not 0 <= value <= most:
            raise UnreadableSteps(f"a step has {name} {value}; it must be seconds, 0 to {most:.0f}")
    if step.at is not None and not 0 <= step.at <= _LATEST:
        raise UnreadableSteps(f"a step has at {step.at}; it must be a Unix time, until the year 3000")
    try:
        check_priority(step.priority)
    except ConfigurationError as error:
        raise UnreadableSteps(f"a step's {error}") from None
    if wrong := wrong_headers(step.headers):
        raise UnreadableSteps(f"of a step {wrong}")


#: The year 3000.
_LATEST = 32_503_680_000.0
