"""What becomes of priorities, by the server's version and the queue that is there."""

from __future__ import annotations

import pytest

from leveret import Queue
from leveret.brokers.rabbitmq.queues.priorities import expires_in_order, given
from leveret.brokers.rabbitmq.queues.topology import Declaration

QUORUM = Declaration("q", arguments={"x-queue-type": "quorum"})


def classic(most: int | None) -> Declaration:
    return Declaration("q", arguments={} if most is None else {"x-queue-type": "classic", "x-max-priority": most})


@pytest.mark.parametrize(
    ("version", "complete", "text"),
    [
        ((3, 10, 8), False, "RabbitMQ 3.10.8 ignores priorities in a quorum queue; upgrade to 4.3, or have a classic"),
        ((3, 13, 7), False, "ignores priorities"),
        ((4, 0, 5), False, "RabbitMQ 4.0.5 knows two priorities in a quorum queue, above 4 and the rest"),
        ((4, 2, 1), False, "knows two priorities"),
        ((4, 3, 0), True, "priorities are strict (a quorum queue on RabbitMQ 4.3.0)"),
        ((4, 10, 0), True, "priorities are strict"),
        ((5, 0), True, "priorities are strict"),
        ((0,), False, "ignores priorities"),
    ],
)
def test_a_quorum_queue_gives_what_its_server_can(version: tuple[int, ...], complete: bool, text: str) -> None:
    priorities = given(Queue("q", priorities=True), QUORUM, version)
    assert priorities.complete == complete
    assert text in priorities.text


@pytest.mark.parametrize(
    ("queue", "most", "complete", "text"),
    [
        (Queue("q", kind="classic"), 9, True, "priorities are strict (a classic queue with x-max-priority=9)"),
        (Queue("q", kind="classic"), 10, True, "priorities are strict"),
        (Queue("q", kind="classic"), 3, False, "x-max-priority=3, so a higher priority counts as 3"),
        (Queue("q", kind="classic"), None, False, "without x-max-priority, which ignores priorities"),
        (Queue("q", priorities=True), None, False, "without x-max-priority, which ignores priorities"),
        (Queue("q", priorities=True), 9, False, "a task without a priority counts as 0"),
    ],
)
def test_a_classic_queue_gives_what_it_was_made_with(queue: Queue, most: int | None, complete: bool, text: str) -> None:
    """In every version."""
    for version in ((3, 10, 8), (4, 1, 0), (4, 3, 6)):
        priorities = given(queue, classic(most), version)
        assert priorities.complete == complete
        assert text in priorities.text


@pytest.mark.parametrize(
    ("version", "in_order"),
    [((3, 10, 8), True), ((3, 13, 7), True), ((4, 0, 0), False), ((4, 2, 9), False), ((4, 3, 0), True)],
)
def test_mixed_priorities_hold_one_another_up_in_some_versions(version: tuple[int, ...], in_order: bool) -> None:
    assert expires_in_order(version) == in_order
