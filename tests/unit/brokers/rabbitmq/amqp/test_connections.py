"""The edge to aio-pika: what its exceptions mean."""

from __future__ import annotations

import errno
import os

import pytest

from leveret.brokers.rabbitmq.amqp import connections as amqp


async def raises(error: Exception) -> None:
    raise error


async def test_a_bare_exception_is_a_lost_line() -> None:
    """What aiormq gives to those who wait for a confirm when the server has agreed to close the connection."""
    with pytest.raises(amqp.LinkLost):
        await amqp.told(raises(Exception()))


async def test_any_other_exception_is_told_as_it_is() -> None:
    with pytest.raises(ValueError, match="a mistake"):
        await amqp.told(raises(ValueError("a mistake")))


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.ENETDOWN])
async def test_an_error_of_the_system_is_a_lost_line(number: int) -> None:
    """OSErrors that are no ConnectionError; ETIMEDOUT even is a TimeoutError, but none of ours."""
    with pytest.raises(amqp.LinkLost, match=os.strerror(number)):
        await amqp.told(raises(OSError(number, os.strerror(number))))


async def test_a_timeout_of_ours_is_told_as_it_is() -> None:
    with pytest.raises(TimeoutError):
        await amqp.told(raises(TimeoutError()))
