"""What a worker does without the marks of cancelled tasks; with a server that only refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.control import cancel_log as marks
from leveret.brokers.rabbitmq.control.cancel_log import CancelLog
from leveret.brokers.rabbitmq.queues.declare import OnceLogger
from leveret.brokers.rabbitmq.statuses.streams import Reading

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.queues.publisher import Publisher
    from leveret.brokers.rabbitmq.statuses.streams import Place
    from leveret.model import CancelRequest


class Link:
    connection = None


@pytest.mark.parametrize(
    "refusal",
    [
        amqp.ChannelPreconditionFailed("the stream does not have a running replica on the local node"),
        amqp.ChannelNotFoundEntity("no queue 'leveret.cancelled'"),
        amqp.ChannelAccessRefused("access refused"),
    ],
    ids=lambda refusal: type(refusal).__name__,
)
async def test_a_worker_begins_without_what_it_cannot_read(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that came to the cluster after the stream was made has no copy of it; and it says what that means."""

    async def is_there(*_: object) -> tuple[int, int]:
        return 0, 0

    async def begin(_: Reading, place: Place) -> None:
        assert place == "first"
        raise refusal

    monkeypatch.setattr(marks, "message_count", is_there)
    monkeypatch.setattr(Reading, "begin", begin)
    heard: list[CancelRequest] = []
    book = CancelLog(cast("Publisher", None), OnceLogger(), heard.extend)
    await book.read_on(cast("amqp.Link", Link()))
    assert "tasks that are cancelled before they run, run all the same" in caplog.text
    assert str(refusal) in caplog.text
    assert not heard
